"""`sparsify_ffn`: the same tokens as dense, by the kernel, in gated blocks, in copies and files; what pays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.models import relu_model
from support.sparse_calls import Calls
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.downstream import sparse_ffn, sparse_products
from hf_lambda_gelu.downstream.crossover import Crossover

# name → the linear maps that become sparse
MAPS = {
    "llama": [f"model.layers.{i}.mlp.{m}_proj" for i in (0, 1) for m in ("up", "down")],
    "gpt2": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"],
    "whisper": [f"model.{side}.layers.{i}.fc2" for side in ("encoder", "decoder") for i in (0, 1)],
    "t5": [
        f"{side}.block.{i}.layer.{j}.DenseReluDense.{m}"
        for side, j in (("encoder", 1), ("decoder", 2))
        for i in (0, 1)
        for m in ("wi_1", "wo")
    ],
}


def generated(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Eight tokens, and the logits of all steps."""
    main = model.main_input_name
    given = tiny.inputs(model)[main][:1]
    given = given.to(model.dtype) if given.is_floating_point() else given
    out = model.generate(
        **{main: given}, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("dtype", sparse_products.DTYPES, ids=str)
@pytest.mark.parametrize("name", list(MAPS))
def test_generation(name: str, dtype: torch.dtype, calls: Calls) -> None:
    """The same tokens by the same logits; the prompt is dense, each token after it goes through the kernel in all layers."""
    model = relu_model(name).to(dtype)
    if name == "t5":
        model.generation_config.decoder_start_token_id = 0
    tokens, logits = generated(model)
    report = hlg.sparsify_ffn(model)
    assert [m.name for m in report.maps] == MAPS[name]
    assert not report.dense
    sparse_tokens, sparse_logits = generated(model)
    scale = logits.abs().max()
    assert (sparse_logits - logits).abs().max() <= (1e-6 if dtype is torch.float32 else 4e-2) * scale
    if dtype is torch.float32:
        assert torch.equal(sparse_tokens, tokens)
    steps = 8 if name in ("whisper", "t5") else 7  # a decoder of its own starts with one token
    assert calls["gathered"] == 2 * steps
    assert calls.get("chosen", 0) == (2 * steps if name in ("llama", "t5") else 0)


def test_against_float64(calls: Calls) -> None:
    """No farther from the network in fp64 than dense is, but for a factor."""
    model = relu_model("llama")
    ids = tiny.inputs(model)["input_ids"][:1, :1]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
        dense = model(ids).logits
        hlg.sparsify_ffn(model)
        sparse = model(ids).logits
    assert calls["chosen"] == calls["gathered"] == 2
    assert (sparse - exact).abs().max() <= 4 * (dense - exact).abs().max()


def test_what_does_not_pay_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_ffn, "crossover", lambda *_: Crossover(1.0, 2.0, 0.0))
    model = relu_model("llama")
    before = tiny.snapshot(model)
    report = hlg.sparsify_ffn(model)
    assert not report.maps
    assert list(report.dense) == MAPS["llama"]
    assert tiny.snapshot(model) == before
    assert all(p.is_contiguous() for p in model.parameters())
    assert {type(m) for m in model.modules()} == {type(m) for m in relu_model("llama").modules()}


class Gated(nn.Module):
    """A gated block in which something is unlike Llama's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.relu = kind, nn.ReLU()
        self.gate, self.up, self.down = nn.Linear(6, 40), nn.Linear(6, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "up first":
            up = self.up(x)
            return self.down(self.relu(self.gate(x)) * up)  # type: ignore[no-any-return]
        if self.kind == "negated":
            return self.down(self.relu(self.gate(x) * -1.0) * self.up(x))  # type: ignore[no-any-return]
        if self.kind == "shifted":
            return self.down((self.relu(self.gate(x)) + 1) * self.up(x))  # type: ignore[no-any-return]
        if self.kind == "used twice":
            gate, up = self.relu(self.gate(x)), self.up(x)
            return self.down(gate * up) + up[..., :3]  # type: ignore[no-any-return]
        return self.down(self.relu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "sparse"),
    [("as Llama's", 2), ("negated", 2), ("up first", 1), ("shifted", 0), ("used twice", 1)],
)
def test_gated_blocks_of_other_kinds(kind: str, sparse: int, calls: Calls) -> None:
    model = Gated(kind)
    xs = torch.randn(5, 1, 6)
    with torch.no_grad():
        expected = [model(x) for x in xs]
        report = hlg.sparsify_ffn(model, xs[0])
        assert len(report.maps) == sparse
        for x, wanted in zip(xs, expected, strict=True):
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert sum(calls.values()) == 5 * sparse
    assert bool(report.dense) == (sparse < 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_of_their_own(copied: Callable[[nn.Module], nn.Module], calls: Calls) -> None:
    """A copy of a sparse network is one, and undoing the first leaves it so."""
    model, x = Gated("as Llama's"), torch.randn(1, 6)
    with torch.no_grad():
        expected = model(x)
        report = hlg.sparsify_ffn(model, x)
        other = copied(model)
        report.undo()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        assert not calls
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)
    assert calls == {"gathered": 1, "chosen": 1}


def test_saved_files_are_the_same(tmp_path: Path, calls: Calls) -> None:
    model = relu_model("llama")
    model.save_pretrained(tmp_path / "dense")
    hlg.sparsify_ffn(model)
    model.save_pretrained(tmp_path / "sparse")
    hlg.save_relu_pretrained(model, tmp_path / "verified")
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    for folder in ("sparse", "verified"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert (tmp_path / "dense" / "config.json").read_bytes() == (tmp_path / "sparse" / "config.json").read_bytes()


def test_zeros_are_counted_in_a_sparse_network(calls: Calls) -> None:
    model = relu_model("llama")
    batches = [tiny.inputs(model)]
    expected = hlg.activation_sparsity(model, batches)
    hlg.sparsify_ffn(model)
    assert hlg.activation_sparsity(model, batches).zeros == pytest.approx(expected.zeros, abs=1e-3)


def test_measured_on_a_network_that_is_large_enough() -> None:
    """Nothing replaced: on maps of four megabytes the kernel pays at 90 % zeros, and the report says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
    with torch.no_grad():
        model[0].bias.fill_(-0.75)
        x = torch.randn(1, 512)
        expected = model(x)
        report = hlg.sparsify_ffn(model, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)
    (found,) = report.maps
    assert (found.name, found.shape) == ("2", (2048, 512))
    assert 0 < found.sparse < found.dense
    assert 0 <= found.pays_from < 0.9
    lines = str(report).splitlines()
    assert lines[0] == "1 linear maps read the weights of firing units alone, one row at a time"
    assert lines[2].split()[:4] == ["2", "2048", "→", "512"]
    assert report.to_dict() == {
        "maps": [
            {
                "name": "2",
                "shape": [2048, 512],
                "dense": found.dense,
                "sparse": found.sparse,
                "pays_from": found.pays_from,
            }
        ],
        "dense": {},
    }
