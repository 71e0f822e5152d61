"""The tiny models and the verbs that `injection` stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_lambda_gelu as hlg

_SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


class Shared(nn.Module):
    """Two blocks that share one activation, with a batch norm, whose buffers a forward pass in training writes into."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.GELU()
        self.first = nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 8))
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8))
        self.last = nn.ModuleDict({"in": nn.Linear(8, 16), "act": act, "out": nn.Linear(16, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(self.norm(x + self.first(x)))
        return self.last["out"](self.last["act"](self.last["in"](x)))


def _bert() -> nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**_SIZES)).train()
    model.dropout.eval()
    model.bert.embeddings.requires_grad_(False)
    return model


def _llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True, max_position_embeddings=32)).eval()


def _shared() -> nn.Module:
    torch.manual_seed(0)
    return Shared().train()


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "llama": _llama, "shared": _shared}


def batches(model: nn.Module) -> list[Any]:
    """A calibration set; BERT's has padding, so that masks are looked at."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Shared):
        return [torch.randn(16, 8, generator=generator) for _ in range(2)]
    found: list[Any] = [{"input_ids": torch.randint(0, 50, (6, 5), generator=generator)} for _ in range(2)]
    if isinstance(model, BertForSequenceClassification):
        for batch in found:
            batch["attention_mask"] = torch.ones(6, 5, dtype=torch.long).tril(3)
    return found


@dataclass(frozen=True)
class Verb:
    """A verb, as it is run on a model; it may write into the folder.

    Attributes:
        stage: what the model must be: "stock", "converted", "evaluating" (converted, in eval mode), "relu" or "dead" (ReLU,
            with units that are always zero).
        skips: models that it does not take.
        saved: whether it works on the folder "src", where the model is saved before.
    """

    call: Callable[[nn.Module, Path], object]
    stage: str = "converted"
    skips: tuple[str, ...] = ()
    saved: bool = False

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model, at this stage."""
        if self.stage != "stock":
            hlg.convert(model, init_hardness=4.0)
        if self.stage in ("relu", "dead"):
            hlg.relu_ize(model, force=True)
        if self.stage == "dead":
            _kill_units(model)
        if self.stage == "evaluating":
            model.eval()
        return model

    def begin(self, model: nn.Module, folder: Path) -> None:
        """Put into the folder what must lie there before."""
        if self.saved:
            model.save_pretrained(folder / "src")  # type: ignore[operator]

    def run(self, model: nn.Module, folder: Path) -> object:
        return self.call(model, folder)

    def whole(self, folder: Path) -> bool:
        """Whether the folder holds a whole checkpoint, and nothing else that was not there before."""
        top = sorted(path.name for path in folder.iterdir() if not (self.saved and path.name == "src"))
        if top != ["saved"]:
            return False
        found = {path.name for path in (folder / "saved").iterdir()}
        weights = "model.safetensors.index.json" if "model.safetensors.index.json" in found else "model.safetensors"
        return {"config.json", weights, "README.md", "lambda_gelu.json"} <= found


def _gates(model: nn.Module, folder: Path) -> None:
    batch, gradients = batches(model)[0], torch.is_grad_enabled()
    try:
        with hlg.gates_as_relu(model):
            model(**batch) if isinstance(batch, dict) else model(batch)
    finally:  # the block is the caller's, and so is what a stop within Llama's own no_grad leaves there
        torch.set_grad_enabled(gradients)


def _streamed(model: nn.Module, folder: Path) -> None:
    data = batches(model)
    hlg.relu_ize_checkpoint(folder / "src", folder / "saved", calibration=data, compensate="least_squares", hinges=2)


def _kill_units(model: nn.Module) -> None:
    """Three units of each feed-forward block put out zero; Llama's maps have no biases, so a gate's rows are zero there."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("intermediate.dense", "gate_proj", "first.0", "second.0", "in")):
            with torch.no_grad():
                module.weight[:3] = 0.0
                if module.bias is not None:
                    module.bias[:3] = -1.0


def _robustness(model: nn.Module, folder: Path) -> None:
    hlg.verify_robustness(nn.Sequential(*model.first), _first(model)[:2], [0, 1], 0.01)  # type: ignore[misc]


def _first(model: nn.Module) -> Any:
    return batches(model)[0]


VERBS: dict[str, Verb] = {
    "convert": Verb(lambda model, folder: hlg.convert(model), "stock"),
    "relu_ize": Verb(lambda model, folder: hlg.relu_ize(model, force=True)),
    "relu_ize calibration": Verb(lambda model, folder: hlg.relu_ize(model, force=True, calibration=batches(model))),
    "relu_ize bias": Verb(
        lambda m, folder: hlg.relu_ize(m, calibration=batches(m), compensate="bias"), skips=("llama", "shared")
    ),  # all but the last step is least_squares'
    "relu_ize least_squares": Verb(lambda m, folder: hlg.relu_ize(m, calibration=batches(m), compensate="least_squares")),
    "relu_ize hinges": Verb(
        lambda m, folder: hlg.relu_ize(m, calibration=batches(m), compensate="least_squares", hinges=2), skips=("shared",)
    ),  # layers that share one activation cannot be wider
    "relu_ize hinges without data": Verb(lambda m, folder: hlg.relu_ize(m, hinges=4), skips=("shared",)),
    "relu_ize_checkpoint hinges": Verb(_streamed, "stock", skips=("bert", "shared"), saved=True),  # in files, by blocks
    "fold": Verb(lambda model, folder: hlg.fold(model, _first(model)), skips=("llama",)),
    "calibrate": Verb(lambda model, folder: hlg.calibrate(model, batches(model))),
    "sensitivity": Verb(lambda model, folder: hlg.sensitivity(model, batches(model))),
    "gates_as_relu": Verb(_gates, "evaluating"),
    "audit": Verb(lambda model, folder: hlg.audit(model, _first(model))),
    "save_relu_pretrained": Verb(
        lambda model, folder: hlg.save_relu_pretrained(model, folder / "saved"), "relu", skips=("llama", "shared")
    ),  # a folder is written alike whatever is in it
    "activation_sparsity": Verb(lambda model, folder: hlg.activation_sparsity(model, batches(model)), "relu"),
    "prune_dead_units": Verb(
        lambda model, folder: hlg.prune_dead_units(model, batches(model)), "dead", skips=("bert",)
    ),  # as in a Llama, with fewer maps
    "sparsify_ffn": Verb(lambda model, folder: hlg.sparsify_ffn(model, _first(model)), "relu"),
    "verify_robustness": Verb(_robustness, "relu", skips=("bert", "llama")),
}
