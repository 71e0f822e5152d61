"""What stock transformers would build otherwise from a config, against shapes that are written down here."""

from __future__ import annotations

from support import tiny

from hf_lambda_gelu.structure.widths import misfit


def test_a_config_that_says_another_width() -> None:
    model = tiny.build("bert-classifier")
    weights = {model.bert.encoder.layer[1].output.dense.weight}
    assert misfit(model, weights) is None
    model.config.intermediate_size = 40
    reason = misfit(model, weights)
    assert reason is not None
    assert "layer.1.output.dense.weight would be (32, 37)" in reason
    assert "would build (32, 40)" in reason
    assert misfit(model, {model.classifier.weight}) is None  # of other parameters nothing is said
