"""`gates_as_relu`: ReLU within the block, the smooth gates after it."""

from __future__ import annotations

import pytest
from support import tiny
from support.models import hardened, roformer

import hf_lambda_gelu as hlg


def test_gates_as_relu_is_undone() -> None:
    """An exception inside the block does not leave the gates hard."""
    model = hardened("bert", 1.0)
    batch = tiny.inputs(model)
    soft = tiny.outputs(model, batch)
    with pytest.raises(KeyError, match="inside"), hlg.gates_as_relu(model):  # noqa: PT012
        assert tiny.relative_difference(soft, tiny.outputs(model, batch)) > 1e-3
        raise KeyError("inside")
    assert tiny.relative_difference(soft, tiny.outputs(model, batch)) == 0.0


def test_gates_as_relu_nests() -> None:
    """The end of an inner block, such as an evaluation inside one, leaves the outer block in force."""
    model = hardened("bert", 1.0)
    batch = tiny.inputs(model)
    with hlg.gates_as_relu(model):
        hard = tiny.outputs(model, batch)
        with hlg.gates_as_relu(model):
            pass
        assert tiny.relative_difference(hard, tiny.outputs(model, batch)) == 0.0


def test_gates_as_relu_and_a_lookup() -> None:
    """What evaluation with hard gates sees is what relu_ize makes, also where forward makes its own activation."""
    model = roformer()
    batch = tiny.inputs(model)
    with hlg.gates_as_relu(model):
        expected = tiny.outputs(model, batch)
    hlg.relu_ize(model)
    assert tiny.relative_difference(expected, tiny.outputs(model, batch)) == 0.0
