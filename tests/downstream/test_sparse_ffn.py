"""`sparsify_ffn`: the same tokens as dense, by the kernel where it may run and by torch where it may not, and back again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.models import converted, relu_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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


class Calls(dict[str, int]):
    """How often the kernel gave an answer, and how often more units fired than pays."""

    def counted(self, name: str, run: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def counting(*args: Any) -> Tensor | None:
            out = run(*args)
            key = name if out is not None else f"{name}, dense"
            self[key] = self.get(key, 0) + 1
            return out

        return counting


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The kernel pays always: for models as tiny as these it would never."""
    monkeypatch.setattr(sparse_ffn, "crossover", lambda dense, sparse: Crossover(2.0, 1.0, 1.0))
    found = Calls()
    for name in ("gathered", "chosen"):
        monkeypatch.setattr(sparse_products, name, found.counted(name, getattr(sparse_products, name)))
    return found


def sequential(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).to(dtype)


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


def test_undo(calls: Calls) -> None:
    """Classes, attributes and the order in memory are as before; a second time does nothing."""
    for name in ("llama", "gpt2"):
        model = relu_model(name)
        before = tiny.snapshot(model)
        layouts = {n: p.stride() for n, p in model.named_parameters()}
        attributes = [(type(m), set(vars(m))) for m in model.modules()]
        report = hlg.sparsify_ffn(model)
        assert [(type(m), set(vars(m))) for m in model.modules()] != attributes
        report.undo()
        report.undo()
        assert [(type(m), set(vars(m))) for m in model.modules()] == attributes
        assert tiny.snapshot(model) == before
        assert {n: p.stride() for n, p in model.named_parameters()} == layouts


def test_with_block(calls: Calls) -> None:
    model = sequential()
    with hlg.sparsify_ffn(model, torch.randn(2, 6)):
        assert type(model[2]) is not nn.Linear
    assert type(model[2]) is nn.Linear

    def fails() -> None:
        with hlg.sparsify_ffn(model, torch.randn(2, 6)):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert model[2].weight.is_contiguous()


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass, which knows torch's operations and no kernel."""


class Cases:
    """Calls of a sparse network that must be torch's own."""

    @staticmethod
    def several_rows(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(torch.ones(2, 6))

    @staticmethod
    def gradients(model: nn.Module) -> Tensor:
        out = model(torch.ones(1, 6))
        out.sum().backward()
        return torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in model.parameters())])

    @staticmethod
    def autocast(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(torch.ones(1, 6))

    @staticmethod
    def autocast_of_fp32(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model[2](torch.ones(1, 40))

    @staticmethod
    def subclass(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(torch.ones(1, 6).as_subclass(Marked))

    @staticmethod
    def compiled(model: nn.Module) -> Tensor:
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1, 6))

    @staticmethod
    def float64(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(model).double()(torch.ones(1, 6, dtype=torch.float64))

    @staticmethod
    def function_mode(model: nn.Module) -> Tensor:
        with torch.no_grad(), Watching():
            return model(torch.ones(1, 6))

    @staticmethod
    def vmap(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.func.vmap(model)(torch.ones(3, 1, 6))

    @staticmethod
    def export(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.export.export(model, (torch.ones(1, 6),)).module()(torch.ones(1, 6))

    @staticmethod
    def trace(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.jit.trace(model, torch.ones(1, 6), check_trace=False)(torch.ones(1, 6))


@pytest.mark.parametrize("case", [name for name in vars(Cases) if not name.startswith("_")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_dense_where_it_must_be(case: str, calls: Calls) -> None:
    run = getattr(Cases, case)
    dense = run(sequential())
    model = sequential()
    hlg.sparsify_ffn(model, torch.ones(1, 6))
    out = run(model)
    assert (type(out), out.dtype) == (type(dense), dense.dtype)
    torch.testing.assert_close(out, dense, rtol=1e-6, atol=1e-6)
    assert not calls


def test_unlike_dtypes_are_an_error_still(calls: Calls) -> None:
    model = sequential()
    hlg.sparsify_ffn(model, torch.ones(1, 6))
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        model[2](torch.ones(1, 40, dtype=torch.bfloat16))
    assert not calls


def test_dense_below_the_crossover(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more firing units than pay the product is torch's own, to the bit."""
    model = sequential()
    x = torch.ones(1, 6)
    with torch.no_grad():
        fires = int((model[:2](x) != 0).sum())
        assert 5 < fires < 35
        for most, name in ((fires, "gathered"), (fires - 1, "gathered, dense")):
            calls.clear()
            monkeypatch.setattr(sparse_ffn, "crossover", lambda *_, most=most: Crossover(2.0, 1.0, (most + 0.5) / 40))
            with hlg.sparsify_ffn(model, x) as report:
                assert report.maps[0].pays_from == pytest.approx(1 - (most + 0.5) / 40)
                model(x)
            assert dict(calls) == {name: 1}


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


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["crossover", "SparseMap"])
def test_a_stop_changes_nothing(when: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it measures, with weights laid anew; and when the first modules have another class."""
    model = relu_model("llama")
    before = tiny.snapshot(model)
    modules = [(type(m), set(vars(m))) for m in model.modules()]
    monkeypatch.setattr(sparse_ffn, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        hlg.sparsify_ffn(model)
    assert tiny.snapshot(model) == before
    assert [(type(m), set(vars(m))) for m in model.modules()] == modules
    assert all(p.is_contiguous() for p in model.parameters())


def sparse_already() -> nn.Module:
    model = relu_model("llama")
    hlg.sparsify_ffn(model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: converted("llama"), "call hf_lambda_gelu.relu_ize"),
        (lambda: tiny.build("llama"), "is smooth"),
        (lambda: relu_model("llama").to("meta"), "meta device"),
        (sequential, "no inputs can be guessed for Sequential: pass inputs="),
        (sparse_already, r"sparse already: call undo\(\)"),
    ],
)
def test_refused(model: Callable[[], nn.Module], message: str, calls: Calls) -> None:
    built = model()
    with pytest.raises(ValueError, match=message):
        hlg.sparsify_ffn(built)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = relu_model("llama")
    before = tiny.snapshot(model)
    monkeypatch.setattr(sparse_products._LIBRARY, "_loaded", "the C++ kernel could not be built: no C++ compiler found")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found"):
        hlg.sparsify_ffn(model)
    assert tiny.snapshot(model) == before


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
