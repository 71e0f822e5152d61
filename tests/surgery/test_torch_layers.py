"""torch's own transformer layers: their fused kernel computes by a second record, which must say what is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg

ACTIVATIONS: dict[str, Callable[[], Any]] = {"string": lambda: "gelu", "function": lambda: F.gelu, "module": nn.GELU}


def loud(model: nn.Module) -> nn.Module:
    """Weights that are large enough for GELU and ReLU to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval()


def layer(activation: Any, **options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True, **options)


def fast(model: nn.Module, *args: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(*args, **kwargs)
    return output


def slow(model: nn.Module, *args: Tensor, **kwargs: Any) -> Tensor:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return fast(model, *args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def reference(model: nn.TransformerEncoderLayer, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A post-norm layer, written out."""
    x = model.norm1(x + model.self_attn(x, x, x, need_weights=False)[0])
    return model.norm2(x + model.linear2(function(model.linear1(x))))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_every_state_is_what_runs(kind: str) -> None:
    """λ-GELU, its ReLU, the folded GELU and the substituted one, each against the layer written out."""
    model, x = loud(layer(ACTIVATIONS[kind]())), torch.randn(4, 5, 16)
    hlg.convert(model, 3.0)
    assert list(hlg.hardness_sites(model)) == ["activation"]
    assert model.activation_relu_or_gelu == 0
    hard = fast(model, x)
    with torch.no_grad():
        expected = reference(model, x, lambda z: z * 0.5 * (1.0 + torch.erf(3.0 * z / 2.0**0.5)))
        as_relu = reference(model, x, F.relu)
    torch.testing.assert_close(hard, expected, rtol=1e-4, atol=1e-5)
    with hlg.gates_as_relu(model):
        torch.testing.assert_close(fast(model, x), as_relu, rtol=1e-4, atol=1e-5)
    hlg.fold(model, x)
    assert model.activation_relu_or_gelu == 2
    assert isinstance(model.activation, nn.GELU)
    torch.testing.assert_close(fast(model, x), hard, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast(model, x), slow(model, x), rtol=1e-4, atol=1e-5)
    other = loud(layer(ACTIVATIONS[kind]()))
    hlg.convert(other, 1e4)
    hlg.relu_ize(other)
    assert other.activation_relu_or_gelu == 1
    assert isinstance(other.activation, nn.ReLU)
    torch.testing.assert_close(fast(other, x), as_relu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast(other, x), slow(other, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast(other, x), hard, atol=1e-3)


@pytest.mark.parametrize("norm_first", [False, True])
def test_stack_with_padding(norm_first: bool) -> None:
    """Packed sequences are for torch's kernel alone: with λ-GELU there are none, with ReLU there are again."""
    made = nn.TransformerEncoder(layer("gelu", norm_first=norm_first), 2, enable_nested_tensor=not norm_first)
    packs = made.use_nested_tensor
    model, x = loud(made), torch.randn(4, 5, 16)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    before = fast(model, x, src_key_padding_mask=padding)
    hlg.convert(model)
    after = fast(model, x, src_key_padding_mask=padding)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-4, atol=1e-5)
    assert model.use_nested_tensor is False
    batches = [{"src": torch.randn(8, 5, 16), "src_key_padding_mask": padding[:1].expand(8, 5)} for _ in range(4)]
    report = hlg.relu_ize(model, calibration=batches, compensate="least_squares")
    assert report.unreached == []
    assert model.use_nested_tensor is packs
    quick = fast(model, x, src_key_padding_mask=padding)[:, :3]
    torch.testing.assert_close(quick, slow(model, x, src_key_padding_mask=padding)[:, :3], rtol=1e-4, atol=1e-5)
    assert tiny.relative_difference([quick], [before[:, :3]]) > 1e-3


@pytest.mark.parametrize("activation", ["gelu", F.silu])
def test_encoder_and_decoder(activation: Any) -> None:
    torch.manual_seed(0)
    if activation == "gelu":
        model: nn.Module = loud(nn.Transformer(16, 2, 1, 1, 32, activation=activation, batch_first=True))
        inputs: tuple[Tensor, ...] = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
        names = ["encoder.layers.0.activation", "decoder.layers.0.activation"]
    else:
        model = loud(nn.TransformerDecoderLayer(16, 2, 32, activation=activation, batch_first=True))
        inputs, names = (torch.randn(2, 5, 16), torch.randn(2, 4, 16)), ["activation"]
    before = fast(model, *inputs)
    report = hlg.convert(model)
    assert [site.name for site in report.sites] == names
    assert not report.unconverted
    torch.testing.assert_close(fast(model, *inputs), before, rtol=1e-4, atol=1e-5)
    hlg.relu_ize(model, force=True)
    assert not hlg.hardness_sites(model)
    torch.testing.assert_close(fast(model, *inputs), slow(model, *inputs), rtol=1e-4, atol=1e-5)


def test_only_and_learning() -> None:
    """`only` sees the function as a module; λ has a gradient in training mode."""
    made = nn.TransformerEncoder(layer(F.gelu), 2)
    report = hlg.convert(made, only=lambda name, module: name.startswith("layers.1"))
    assert [site.name for site in report.sites] == ["layers.1.activation"]
    assert [(item.name, item.reason) for item in report.unconverted] == [("layers.0.activation", "`only` does not take it")]
    assert made.layers[0].activation is F.gelu
    assert made.layers[0].activation_relu_or_gelu == 2
    made.train()(torch.randn(2, 5, 16)).sum().backward()
    gradient = made.layers[1].activation.unclipped_hardness.grad
    assert gradient is not None
    assert float(gradient) != 0.0
