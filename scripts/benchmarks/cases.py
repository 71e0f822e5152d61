"""What run.py measures: rivals of F.gelu as functions, inside torch.compile, and whole training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.activations import XIELUActivation

import hf_lambda_gelu as hlg

REPEATS = 9
STOCK = "F.gelu"
SECONDS = {"cpu": 0.5, "cuda": 0.1}  # of a repeat
SIZES = {"cpu": [(64, 3072), (1024, 1024), (1024, 3072), (4096, 3072)], "cuda": [(64, 3072), (4096, 4096), (16384, 4096)]}


@dataclass(frozen=True)
class Result:
    """Time and saved memory of `what` as multiples of stock GELU's: the median of the repeats, the least and the most."""

    section: str
    device: str
    dtype: str
    shape: str
    what: str
    time: float
    least: float
    most: float
    memory: float
    stock_ms: float


class LearnableSwish(nn.Module):
    """x σ(βx) as one writes it: autograd through the formula."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta.to(x.dtype) * x)


def interleave(stock: Callable[[], object], rival: Callable[[], object], device: str, seconds: float) -> list[list[float]]:
    """For each repeat of so many seconds, the median times of both, which take turns, one first and then the other."""
    timed: Callable[[Callable[[], object]], float] = _by_events if device == "cuda" else _by_clock
    for _ in range(3):  # compiled, allocated, caches filled
        once = timed(stock) + timed(rival)
    calls = 1
    if device == "cuda":
        calls = max(1, min(10, int(0.02 / once)))
        timed = partial(_by_events, calls=calls)
    repeats = []
    for _ in range(REPEATS):
        taken: list[list[float]] = [[], []]
        for turn in range(max(2, min(200, int(seconds / (once * calls))))):
            for which in (0, 1) if turn % 2 else (1, 0):
                taken[which].append(timed((stock, rival)[which]))
        repeats.append([statistics.median(times) for times in taken])
    return repeats


def _by_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _by_events(run: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call, several in a row: as in training, the device computes one while the next is launched."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def results(
    section: str, device: str, dtype: str, shape: str, runs: dict[str, Callable[[], object]], saved: dict[str, int]
) -> Iterator[Result]:
    """Each rival against stock GELU, two by two: one that needs much memory leaves the next a heap of its own making."""
    for name in runs:
        if name != STOCK:
            repeats = interleave(runs[STOCK], runs[name], device, seconds=SECONDS[device])
            ratios = [ours / stock for stock, ours in repeats]
            times = statistics.median(ratios), min(ratios), max(ratios)
            memory = saved[name] / saved[STOCK]
            stock_ms = 1e3 * statistics.median(stock for stock, _ in repeats)
            yield Result(section, device, dtype, shape, name, *times, memory, stock_ms)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """What autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


def without_kernel(run: Callable[[], object]) -> None:
    """What runs where there is no compiler."""
    before = hlg.set_kernels("torch")
    try:
        run()
    finally:
        hlg.set_kernels(before)


def activations(device: str) -> Iterator[Result]:
    """Forward and backward with gradients for x and whatever is learned."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SIZES[device]:
            x = torch.randn(shape, device=device).to(dtype).requires_grad_()
            grad = torch.randn(shape, device=device).to(dtype)
            one = torch.tensor([2.0], device=device, requires_grad=True)
            each = torch.full(shape[-1:], 2.0, device=device, requires_grad=True)
            xielu = XIELUActivation(dtype=dtype).to(device)
            swish = LearnableSwish().to(device)

            functions: dict[str, Callable[[Tensor], Tensor]] = {
                STOCK: F.gelu,
                "λ-GELU": lambda x, one=one: hlg.lambda_gelu(x, one),
                "λ-GELU, λ per neuron": lambda x, each=each: hlg.lambda_gelu(x, each),
                "λ-GELU, no kernel": lambda x, one=one: hlg.lambda_gelu(x, one),
                "λ-GELU, autograd": lambda x, one=one: hlg.lambda_gelu_reference(x, one.to(x.dtype)),
                "xIELU": xielu,
                "learnable Swish": swish,
            }
            learned = [x, one, each, *xielu.parameters(), *swish.parameters()]

            def step(function: Callable[[Tensor], Tensor], x: Tensor = x, grad: Tensor = grad, learned=learned) -> None:
                function(x).backward(grad)
                for tensor in learned:
                    tensor.grad = None

            runs = {name: lambda f=function, step=step: step(f) for name, function in functions.items()}
            runs["λ-GELU, no kernel"] = lambda run=runs["λ-GELU, no kernel"]: without_kernel(run)
            saved = {name: saved_bytes(lambda f=function, x=x: f(x)) for name, function in functions.items()}
            yield from results("activation", device, str(dtype)[6:], "×".join(map(str, shape)), runs, saved)


def compiled(device: str) -> Iterator[Result]:
    """Inside torch.compile: a feed-forward block, and the activation between pointwise neighbours that a compiler fuses."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("feed-forward 768-3072-768", "bias, activation, product"):
            modules: dict[str, nn.Module] = {STOCK: nn.GELU(), "λ-GELU": hlg.LambdaGELU(2.0)}
            width = 768 if name.startswith("feed") else 3072
            x = torch.randn(1024, width, device=device).to(dtype).requires_grad_()
            runs, saved = {}, {}
            for key, activation in modules.items():
                torch.manual_seed(0)
                block = _Neighbours(activation)
                if name.startswith("feed"):
                    block = nn.Sequential(nn.Linear(768, 3072), activation, nn.Linear(3072, 768))
                block = block.to(device).to(dtype)
                whole = torch.compile(block, fullgraph=True)
                runs[key] = lambda f=whole, x=x: f(x).sum().backward()
                runs[key]()
                saved[key] = saved_bytes(lambda f=whole, x=x: f(x))
            yield from results("torch.compile", device, str(dtype)[6:], name, runs, saved)
            torch.compiler.reset()


class _Neighbours(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.bias = activation, nn.Parameter(torch.zeros(3072))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.bias) * 2.0


def bert(device: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """BERT-base: 12 layers, width 768; 2 × 128 tokens on a CPU, 32 × 512 on CUDA."""
    shape = (2, 128) if device == "cpu" else (32, 512)
    model = BertForSequenceClassification(BertConfig())
    return model, {"input_ids": torch.randint(1000, 30000, shape), "labels": torch.zeros(shape[0], dtype=torch.long)}


def vit(device: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """ViT-B/16 at 224 × 224: 12 layers, width 768; 2 images on a CPU, 64 on CUDA."""
    images = 2 if device == "cpu" else 64
    model = ViTForImageClassification(ViTConfig())
    return model, {"pixel_values": torch.randn(images, 3, 224, 224), "labels": torch.zeros(images, dtype=torch.long)}


def training_steps(device: str) -> Iterator[Result]:
    """Forward, backward and AdamW of whole models; λ has a group of its own and the optimizer-aware update.

    In fp32, and on a GPU in bf16 by autocast too.
    """
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        for name, build in (("BERT-base", bert), ("ViT-B/16", vit)):
            runs, saved = {}, {}
            for key in (STOCK, "λ-GELU"):
                torch.manual_seed(0)
                model, batch = build(device)
                model, batch = model.to(device).train(), {k: v.to(device) for k, v in batch.items()}
                if key != STOCK:
                    hlg.convert(model)
                loss = partial(_loss, model, batch, dtype)
                runs[key], saved[key] = _training_step(model, loss), saved_bytes(loss)
            shape = " × ".join(str(n) for n in next(iter(batch.values())).shape)
            yield from results("training step", device, str(dtype)[6:], f"{name}, {shape}", runs, saved)


def _loss(model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    with torch.autocast(model.device.type, dtype, enabled=dtype is not torch.float32):
        return model(**batch).loss


def _training_step(model: PreTrainedModel, loss: Callable[[], Tensor]) -> Callable[[], object]:
    sites = hlg.hardness_sites(model)
    optimizer = torch.optim.AdamW(hlg.parameter_groups(model, 0.01) if sites else model.parameters(), lr=1e-5)
    if sites:
        hlg.attach_hardness_update(optimizer, model)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def conversion(device: str) -> Iterator[tuple[str, str, float, float]]:
    """(model, verb, seconds, as a multiple of building the model), the least of three."""
    for name, build in (("BERT-base", bert), ("ViT-B/16", vit)):
        taken: dict[str, list[float]] = {"build": [], "convert": [], "relu_ize": []}
        for _ in range(3):
            start = time.perf_counter()
            model, _ = build(device)
            taken["build"].append(time.perf_counter() - start)
            for verb, run in (("convert", hlg.convert), ("relu_ize", lambda model: hlg.relu_ize(model, force=True))):
                start = time.perf_counter()
                run(model)
                taken[verb].append(time.perf_counter() - start)
        for verb in ("convert", "relu_ize"):
            yield name, verb, min(taken[verb]), min(taken[verb]) / min(taken["build"])
