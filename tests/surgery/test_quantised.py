"""Weights that are quantised, in the forms of several libraries: convert and substitute, and are not refit or folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat, quantize_dynamic
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.integrations.bitnet import AutoBitLinear

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.compression import pruned_maps
from hf_lambda_gelu.checkpoints.save import check_relu


class Packed(Tensor):
    """As quanto and torchao keep a weight: a float tensor to look at, whose elements are integers in another one."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> Packed:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scale = weight.detach().abs().max() / 127
        made.codes = (weight.detach() / made.scale).round().to(torch.int8)
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        whole = lambda x: x.codes.to(x.scale.dtype) * x.scale if isinstance(x, Packed) else x  # noqa: E731
        return func(*pytree.tree_map(whole, args), **pytree.tree_map(whole, kwargs or {}))


class PackedLinear(nn.Module):
    """As HQQ packs integers into floats; the product is a function of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8).flatten()
        self.W_q = nn.Parameter(F.pad(codes, (0, -len(codes) % 4)).view(torch.float32), requires_grad=False)
        self.shape, self.bias = linear.weight.shape, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        codes = self.W_q.data.view(torch.int8)[: self.shape.numel()].view(self.shape)
        return F.linear(x, codes * self.scale, self.bias)


def wrapped(model: PreTrainedModel) -> None:
    for layer in model.bert.encoder.layer:
        layer.output.dense.weight = nn.Parameter(Packed(layer.output.dense.weight), requires_grad=False)


def packed(model: PreTrainedModel, package: str) -> None:
    kind: Any = type("PackedLinear", (PackedLinear,), {"__module__": package})
    for layer in model.bert.encoder.layer:
        layer.output.dense = kind(layer.output.dense)


def loaded_by(model: PreTrainedModel, method: str) -> None:
    """What from_pretrained leaves of the quantiser that has loaded a model."""
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    model.is_quantized = True


def bitnet(model: PreTrainedModel) -> None:
    """Weights of −1, 0 and 1 in float32, in nn.Linear's own place, and a scale of the output."""
    for layer in model.bert.encoder.layer:
        before = layer.output.dense
        layer.output.dense = AutoBitLinear(before.in_features, before.out_features)
        with torch.no_grad():
            layer.output.dense.weight.copy_(before.weight.sign())
            layer.output.dense.bias.copy_(before.bias)
            layer.output.dense.weight_scale.fill_(0.05)
    loaded_by(model, "bitnet")


KINDS: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "a tensor of its own class": (wrapped, r"layer\.0\.output\.dense\.weight"),
    "HQQ": (lambda m: packed(m, "hqq.core.quantize"), r"layer\.0\.output\.dense\.weight"),
    "quanto, not frozen": (lambda m: packed(m, "optimum.quanto.nn.qlinear"), r"layer\.0\.output\.dense\.weight"),
    "BitNet": (bitnet, "BertForSequenceClassification as bitnet loads it"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_named(kind: str) -> None:
    """What needs the weights says which one is quantised, and changes none; the rest works."""
    quantise, name = KINDS[kind]
    model = tiny.build("bert-classifier")
    batch = tiny.inputs(model)
    quantise(model.eval())
    expected = tiny.outputs(model, batch)
    hlg.convert(model)
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) <= 1e-5
    for refit in (
        lambda: hlg.relu_ize(model, calibration=[batch], compensate="least_squares"),
        lambda: hlg.relu_ize(model, calibration=[batch], compensate="bias"),
        lambda: hlg.harden(model, [batch]),
        lambda: hlg.fold(model, batch),
    ):
        with pytest.raises(ValueError, match=f"{name} is quantised"):
            refit()
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) <= 1e-5
    assert len(hlg.relu_ize(model, force=True, calibration=[batch]).sites) == 2


def dynamically(model: PreTrainedModel) -> None:
    for layer in model.bert.encoder.layer:
        quantize_dynamic(layer.output, {nn.Linear}, inplace=True)


IN_MEMORY: dict[str, Callable[[PreTrainedModel], None]] = {
    "torch, dynamically": dynamically,
    "torchao, in training": lambda m: packed(m, "torchao.quantization.qat.linear"),
    "a tensor of its own class": wrapped,
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", IN_MEMORY)
def test_of_which_no_config_tells(kind: str, tmp_path: Path) -> None:
    """A ReLU network that was quantised in memory: stock transformers would load another one, and no folder is made."""
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    IN_MEMORY[kind](model)
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight is quantised, and no quantization_config"):
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    assert list(tmp_path.iterdir()) == []


def test_4_bits_on_a_cpu(tmp_path: Path) -> None:
    """bitsandbytes writes other scales there than the model has: nothing is saved, in memory nothing changes."""
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    dense = model.bert.encoder.layer[0].output.dense
    kind: Any = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules", "quant_state": None})
    dense.weight = kind(dense.weight.detach(), requires_grad=False)
    loaded_by(model, "bitsandbytes")
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight holds 4 bits of bitsandbytes on a CPU"):
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    assert list(tmp_path.iterdir()) == []


class Sealed(Packed):
    """As torchao's: it is moved and renamed, and no other operation is known."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        raise NotImplementedError(f"{func} of {cls.__name__}")


class WithState(nn.Linear):
    """As 4-bit weights of bitsandbytes: the state dict holds more of a parameter, under names below its own."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.weight.detach().abs().amax(1)


@pytest.mark.parametrize("form", [Sealed, WithState])
def test_what_is_looked_at_before_saving(form: type) -> None:
    """Of weights that transformers has quantised, and can save, what can be looked at: no raw error, no pruning found."""
    model = tiny.build("bert-classifier")
    hlg.convert(model)
    hlg.relu_ize(model, force=True)
    for layer in model.bert.encoder.layer:
        if form is Sealed:
            layer.output.dense.weight = nn.Parameter(Sealed(layer.output.dense.weight), requires_grad=False)
        else:
            layer.output.dense.__class__ = form
    loaded_by(model, "torchao" if form is Sealed else "bitsandbytes")
    check_relu(model)
    assert pruned_maps(model) is None
    if form is WithState:
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.inf
        with pytest.raises(ValueError, match=r"2 tensors hold NaN or infinity, e\.g\. \S+\.1\.output\.dense"):
            check_relu(model)


def test_gguf_that_was_unpacked() -> None:
    """transformers unpacks what it has no packed form for, and keeps the quantiser: these weights are floats."""
    model = tiny.build("bert-classifier")
    loaded_by(model, "gguf")
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=[tiny.inputs(model, seed) for seed in range(3)], compensate="least_squares")
    assert report.compensation is not None
    assert len(report.compensation.sites) == 2


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_fake_quantisation_notes_nothing() -> None:
    """Its observers would move with every pass, in eval mode too, and with gates that are not those that are trained."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    hlg.convert(model.train())
    model[0].qconfig = model[2].qconfig = get_default_qat_qconfig("fbgemm")
    prepare_qat(model, inplace=True)
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(64, 8, generator=generator))
    data = [10.0 * torch.randn(64, 8, generator=generator) for _ in range(4)]  # far out of the range that was noted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for measure in (hlg.calibrate, hlg.sensitivity, hlg.audit):
        measure(model, data[0] if measure is hlg.audit else data)
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed == [], measure
    report = hlg.relu_ize(model, calibration=data, compensate="least_squares")
    assert report.compensation is not None
    assert [site.weight for site in report.compensation.sites] == ["4.weight"]
    assert list(report.compensation.uncompensated) == ["1"]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "post_process" in name)
    model(data[0])  # in training it goes on
    assert not torch.equal(
        model.state_dict()["0.activation_post_process.activation_post_process.max_val"],
        before["0.activation_post_process.activation_post_process.max_val"],
    )
