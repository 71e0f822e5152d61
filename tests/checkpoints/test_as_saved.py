"""What was changed in a model after it was built: stock transformers builds it without, so that it is not saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from support.models import relu_model
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg

Change = Callable[[nn.Module], object]


def head(model: nn.Module) -> None:
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))


def gain(model: nn.Module) -> None:
    """One that the class lacks, in a module that runs."""
    model.classifier.gain = nn.Parameter(torch.tensor(3.0))
    model.classifier.register_forward_hook(lambda module, args, output: output * module.gain)


# kind → (what is done, what undoes it, what is said)
CHANGES: dict[str, tuple[Change, Change, str]] = {
    "weight norm": (
        lambda m: parametrizations.weight_norm(m.classifier),
        lambda m: parametrize.remove_parametrizations(m.classifier, "weight"),
        r"classifier\.weight drawn .* computed from parametrizations .*: call torch\.nn\.utils\.parametrize\.remove_param",
    ),
    "weight norm by hooks": (
        lambda m: utils.weight_norm(m.classifier),
        lambda m: utils.remove_weight_norm(m.classifier, "weight"),
        r"classifier\.weight drawn .* from weight_g and weight_v: call torch\.nn\.utils\.remove_weight_norm\(module",
    ),
    "spectral norm by hooks": (
        lambda m: utils.spectral_norm(m.classifier),
        lambda m: utils.remove_spectral_norm(m.classifier, "weight"),
        r"classifier\.weight drawn .* from weight_orig: call torch\.nn\.utils\.remove_spectral_norm\(module, 'weight'\)",
    ),
    "pruning mask of a bias": (
        lambda m: prune.random_unstructured(m.classifier, "bias", 0.5),
        lambda m: prune.remove(m.classifier, "bias"),
        r"classifier\.bias drawn .*from bias_orig and bias_mask: call torch\.nn\.utils\.prune\.remove\(module, 'bias'\)",
    ),
    "another head": (head, lambda m: None, r"classifier\.bias drawn at random, .*classifier\.0\.bias, which .*another head"),
    "a wider head": (
        lambda m: setattr(m, "classifier", nn.Linear(32, 7)),
        lambda m: None,
        r"it would have classifier\.bias of another shape",
    ),
    "more than the class has": (gain, lambda m: None, r"classifier\.gain, which the class lacks, left out"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_after_it_was_built(kind: str, tmp_path: Path) -> None:
    """Refused, with what undoes it; saved when that is done. Stock transformers itself makes another network of it."""
    change, undo, message = CHANGES[kind]
    model, batch = _relu_classifier(), tiny.inputs(tiny.build("bert-classifier"))
    change(model.train())
    with torch.no_grad():
        model(**batch)  # what spectral norm estimates, it estimates in train mode
    expected = tiny.outputs(model.eval(), batch)
    with pytest.raises(ValueError, match=message):
        hlg.save_relu_pretrained(model, tmp_path / "refused")
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "stock")
    stock = type(model).from_pretrained(tmp_path / "stock", ignore_mismatched_sizes=True).eval()
    got = tiny.outputs(stock, batch)
    assert got[0].shape != expected[0].shape or tiny.relative_difference(expected, got) > 0.01
    undo(model)
    if "head" not in kind and "more" not in kind:
        folder = hlg.save_relu_pretrained(model, tmp_path / "saved")
        reloaded = type(model).from_pretrained(folder).eval()
        assert tiny.relative_difference(expected, tiny.outputs(reloaded, batch)) <= 1e-6


def test_quantisation_that_is_gone(tmp_path: Path) -> None:
    """A config that still says how the weights were packed, of weights that are not: stock transformers cannot load that."""
    model = _relu_classifier()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"are not, so that .*: del model\.config\.quantization_config"):
        hlg.save_relu_pretrained(model, tmp_path / "refused")
    del model.config.quantization_config
    hlg.save_relu_pretrained(model, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def _relu_classifier() -> PreTrainedModel:
    model = relu_model("bert-classifier")
    with torch.no_grad():  # so that a head that is drawn anew is another one
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.classifier.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model
