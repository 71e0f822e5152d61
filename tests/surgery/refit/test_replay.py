"""What keeps a block from being run apart from the model's forward: the refit is that of the whole model, or refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support import tiny
from support.calibration import calibration_set
from support.handmade import Stack, StackConfig
from support.models import converted, randomized
from support.states import full_snapshot, largest_difference, parameters
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.chain_walk import ChainWalk
from hf_lambda_gelu.surgery.refit.chains import Chain
from hf_lambda_gelu.surgery.refit.runs import ReplayError
from hf_lambda_gelu.surgery.refit.two_networks import TwoNetworks

LLM = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def ids(size: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, 99, (size, length), generator=torch.Generator().manual_seed(seed))


def whole_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refits run the whole model from here on."""

    def walk(networks: TwoNetworks, chain: Chain) -> ChainWalk:
        if chain.blocks != [""]:
            raise ReplayError
        return ChainWalk(networks, chain)

    monkeypatch.setattr(engine, "ChainWalk", walk)


def refit(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    assert not report.uncompensated
    return parameters(model)


class Wrapped(nn.Module):
    """A module round a model, whose forward says nothing of a cache."""

    def __init__(self, inner: tf.PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.inner(input_ids, attention_mask=attention_mask).logits
        return logits


def llama(**more: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLM, num_key_value_heads=2, **more)).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_module_round_a_causal_language_model(padded: bool) -> None:
    """A wrapper that hides `use_cache` changes nothing; the config asks for a cache afterwards as before."""
    masks = [torch.ones(4, 9, dtype=torch.long) for _ in range(5)]
    for mask in masks:
        mask[0, 6:] = 1 - padded
    batches = [{"input_ids": ids(4, 9, i), "attention_mask": mask} for i, mask in enumerate(masks)]
    alone, wrapped = llama(mlp_bias=True), Wrapped(llama(mlp_bias=True))
    wanted = refit(alone, batches)
    got = refit(wrapped, batches)
    assert largest_difference(wanted, {k.removeprefix("inner."): v for k, v in got.items()}) < 1e-5
    assert wrapped.inner.config.use_cache is True


class Counter(nn.Module):
    """A layer with a memory: its k-th call in a forward pass is shifted by k. Run apart, the count goes on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down, self.calls = nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(self.act(self.up(x) + 0.3 * self.calls))


class Remembers(nn.Module):
    """Layers whose calls are counted from the start of each forward pass."""

    def __init__(self, width: int = 8, resets: bool = True) -> None:
        super().__init__()
        self.layers, self.resets = nn.ModuleList(Counter(width) for _ in range(3)), resets

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.resets:
                layer.calls = 0
            x = layer(x)
        return x


def test_state_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that keep state are not run apart; a model that never resets it cannot be refit, which is said."""
    batches = [{"x": torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(i))} for i in range(6)]
    torch.manual_seed(0)
    model = Remembers()
    state = parameters(model)
    got = refit(model, batches)
    whole_model_only(monkeypatch)
    reference = Remembers()
    reference.load_state_dict(state)
    assert largest_difference(got, refit(reference, batches)) < 1e-6
    monkeypatch.undo()

    endless = Remembers(resets=False)
    hlg.convert(endless)
    before = parameters(endless)
    with pytest.raises(hlg.CalibrationError, match=r"Remembers\.forward puts out something else each time"):
        hlg.relu_ize(endless, calibration=batches, compensate="least_squares")
    assert largest_difference(before, parameters(endless)) == 0.0


def in_bf16(model: nn.Module) -> None:
    """Let forward run as accelerate does with bf16=True: the model's forward in autocast, its outputs in fp32."""
    forward = model.forward

    def autocast(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        return type(output)({k: v.float() if isinstance(v, Tensor) else v for k, v in output.items()})

    model.forward = types.MethodType(autocast, model)


@pytest.mark.parametrize("name", ["convnext", "t5", "electra", "albert", "wav2vec2", "gpt2"])
def test_wrapped_in_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in the autocast of the model's forward: the refit is that of the whole model, and better than none."""
    found = []
    for whole in (False, True):
        model = converted(name)
        in_bf16(model)
        if whole and name != "albert":  # which is refit on the smooth network's states, not on its own
            whole_model_only(monkeypatch)
        report = hlg.relu_ize(model, calibration=calibration_set(model), compensate="least_squares").compensation
        assert report is not None
        assert all(site.after <= site.before for site in report.sites)
        found.append([(site.name, site.rows, site.target) for site in report.sites])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["convnext", "t5", "llama"])
def test_blocks_are_run_apart_within_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are no more than what stands in where blocks fail: in the right context these do not fail."""
    chains: list[list[str]] = []

    def walk(networks: TwoNetworks, chain: Chain) -> ChainWalk:
        chains.append(chain.blocks)
        return ChainWalk(networks, chain)

    monkeypatch.setattr(engine, "ChainWalk", walk)
    model = converted(name)
    in_bf16(model)
    hlg.relu_ize(model, calibration=calibration_set(model), compensate="least_squares")
    assert chains
    assert [""] not in chains


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("verb", ["relu_ize", "fold"])
def test_casts_of_weights_that_have_changed(verb: str, wrapped: bool) -> None:
    """A user's autocast keeps casts of weights, and a block of autocast within it does: none is used after a change."""
    differences = []
    for on in (False, True):
        model = converted("bert-classifier", 4.0 if verb == "fold" else 1.0)
        if wrapped:
            in_bf16(model)
        batches = calibration_set(model, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=on), torch.no_grad():
            before = model(**batches[0])["logits"].float()
            if verb == "fold":
                hlg.fold(model, batches[0])
            else:
                hlg.relu_ize(model, calibration=batches, compensate="least_squares")
            differences.append(tiny.relative_difference([before], [model(**batches[0])["logits"].float()]))
    assert differences[1] <= 1.2 * differences[0] + 0.03  # two roundings to 8 bits


@pytest.mark.parametrize("make", [lambda: converted("bert-classifier"), lambda: converted("t5"), lambda: converted("vit")])
def test_within_autocast(make: Callable[[], tf.PreTrainedModel]) -> None:
    """Within a user's autocast sums are fp32, weights are cast anew: as good a refit as outside, on the same rows."""
    changes = []
    for on in (False, True):
        model = make()
        batches = calibration_set(model, 12)
        before = tiny.outputs(model, batches[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            hlg.relu_ize(model, calibration=batches, compensate="least_squares")
        changes.append(tiny.relative_difference(before, tiny.outputs(model, batches[0])))
    assert changes[1] <= 1.1 * changes[0]


def test_blocks_that_do_not_always_run() -> None:
    """A block that one batch skips is refit on the others; what comes before it on all."""
    batches = [{"inputs_embeds": torch.randn(4, 6, 8) * (1000.0 if n == 2 else 1.0)} for n in range(6)]
    torch.manual_seed(0)
    model = randomized(Stack(StackConfig(["pre"], ["pre", "pre", "pre"])))
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
    assert report is not None
    assert [site.rows for site in report.sites] == [144, 144, 144, 120]
    assert all(site.after < site.before for site in report.sites)


def test_batch_with_a_cache() -> None:
    """A cache in a batch would grow from run to run: it is refused."""
    model = llama()
    hlg.convert(model)
    before = full_snapshot(model)
    batches = [{"input_ids": ids(4, 9, i), "past_key_values": tf.DynamicCache()} for i in range(3)]
    with pytest.raises(hlg.CalibrationError, match="past_key_values"):
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert full_snapshot(model) == before


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_compiled(how: str) -> None:
    """A compiled model is run as it was before: what is compiled does not know the hooks."""
    batches = [{"input_ids": ids(4, 9, i)} for i in range(5)]
    wanted = refit(llama(mlp_bias=True), batches)
    model: Any = llama(mlp_bias=True)
    hlg.convert(model)
    compiled: Any = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how == "in place":
        model.compile(backend="eager")
    with torch.no_grad():
        compiled(**batches[0])  # compiled without hooks
    hlg.relu_ize(compiled, calibration=batches, compensate="least_squares")
    assert largest_difference(wanted, parameters(model)) < 1e-5


class Switches(nn.Module):
    """Two maps after one activation: which of them runs depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.one, self.other = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.one if float(x[0, 0, 0]) < 50.0 else self.other)(self.act(self.up(x)))
        return y


def test_another_map_in_another_batch() -> None:
    """What the first batch does not show is not taken for it."""
    model = Switches()
    hlg.convert(model)
    before = parameters(model)
    batches = [{"x": torch.randn(4, 6, 8) + 100.0 * (n == 2)} for n in range(5)]
    with pytest.raises(hlg.CalibrationError, match=r"batch 2: act runs, but not one\.weight"):
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert largest_difference(before, parameters(model)) == 0.0
