"""Calibration sets: padding does not count, bad ones are told, and the model is as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import tiny
from support.calibration import BAD_LOADERS, Probe, assert_same, captured, labelled, padded, watched
from support.models import converted
from torch import Tensor, nn

import hf_lambda_gelu as hlg


def test_padding_does_not_count() -> None:
    """More padding, other tokens in it, the same numbers; without the mask they are others."""
    model = converted("bert")
    batch = tiny.inputs(model)
    batch["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
    batch["attention_mask"][0, 8:] = 0
    reference = hlg.calibrate(model, [batch])
    assert [site.count for site in reference.sites] == [(8 + 11) * width for width in (37, 37, 32)]
    x = captured(model, hlg.hardness_sites(model), [batch])  # of all tokens: the rows of padding are cut out here
    keep = np.r_[0:8, 11:22]
    for site in reference.sites:
        rows = x[site.name].reshape(22, -1)[keep]
        assert (site.mean, site.std) == pytest.approx((rows.mean(), rows.std()), rel=1e-6)
    for more in (1, 9):
        assert_same(reference, hlg.calibrate(model, [padded(batch, "input_ids", "attention_mask", more)]))
    unmasked = hlg.calibrate(model, [{"input_ids": batch["input_ids"]}])
    assert unmasked.sites[0].count == 22 * 37


def test_padding_of_an_encoder_and_a_decoder() -> None:
    """Each side by its own mask; the decoder's by its labels where the model makes its input from them."""
    model = converted("t5")
    batch = tiny.inputs(model)
    reference = hlg.calibrate(model, [batch])
    assert [site.count for site in reference.sites] == [2 * 11 * 37] * 2 + [2 * 7 * 37] * 2
    encoder = padded(batch, "input_ids", "attention_mask", 4)
    both = padded(encoder, "decoder_input_ids", "decoder_attention_mask", 5)
    for other in (encoder, both):
        assert_same(reference, hlg.calibrate(model, [other]))

    labels = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    model.config.decoder_start_token_id = model.config.pad_token_id
    short = {"input_ids": batch["input_ids"], "labels": labels}
    longer = {**short, "labels": torch.cat([labels, torch.full((2, 3), -100)], 1)}
    assert_same(hlg.calibrate(model, [short]), hlg.calibrate(model, [longer]))


def test_padding_of_audio() -> None:
    """Of 400 samples the convolutions make 79 and 39 frames; 59 and 29 of them are of 300 samples and no padding."""
    model = converted("wav2vec2")
    batch = tiny.inputs(model)
    batch["attention_mask"] = torch.ones(2, 400, dtype=torch.long)
    batch["attention_mask"][0, 300:] = 0
    seen: dict[str, np.ndarray] = {}
    for name, site in hlg.hardness_sites(model).items():
        site.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach().double().numpy()}))
    report = hlg.calibrate(model, [batch])
    assert len(report.sites) == 5
    for statistics in report.sites:
        x = seen[statistics.name]
        frames, kept = (79, 59) if statistics.name.endswith("conv_layers.0.activation") else (39, 29)
        first = x[0][:, :kept] if x.shape[2] == frames else x[0, :kept]  # channels first, or last
        wanted = np.concatenate([first.reshape(-1), x[1].reshape(-1)])
        assert (statistics.count, statistics.tokens, statistics.padding) == (wanted.size, frames + kept, frames - kept)
        assert (statistics.mean, statistics.std) == pytest.approx((wanted.mean(), wanted.std()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_every_element_counts_where_there_are_no_tokens(name: str) -> None:
    """Channels first or last, patches: there is no padding."""
    model = converted(name)
    batch = tiny.inputs(model)
    expected = captured(tiny.build(name), hlg.hardness_sites(model), [batch])
    for site in hlg.calibrate(model, [batch]).sites:
        x = expected[site.name]
        assert (site.count, site.mean, site.std) == pytest.approx((x.size, x.mean(), x.std()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", list(BAD_LOADERS))
def test_bad_loaders(name: str) -> None:
    loader, message = BAD_LOADERS[name]
    model = converted("bert-classifier")
    with pytest.raises(hlg.CalibrationError, match=message) as caught:
        watched(hlg.calibrate, model, loader())
    if name == "token out of range":
        assert isinstance(caught.value.__cause__, IndexError)
    assert_same(hlg.calibrate(model, [labelled()]), hlg.calibrate(converted("bert-classifier"), [labelled()]))


def test_a_forward_that_raises_half_way() -> None:
    """After the first site has been reached, in the second batch; the cause is kept."""
    model = converted("bert-classifier")
    calls = []

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            if len(calls) == 3:  # the first is one of `watched`
                raise RuntimeError("out of memory")
            return x

    model.bert.encoder.layer[1].output.dropout = Failing()
    with pytest.raises(hlg.CalibrationError, match=r"batch 1: .*RuntimeError: out of memory") as caught:
        watched(hlg.calibrate, model, [labelled(0), labelled(1)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(calls) == 4


def test_pre_activations_that_are_not_finite() -> None:
    """The message names the site and the batch; infinite values of padding do not matter."""
    model = converted("bert-classifier")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[98] = math.inf
    bad = labelled(1)
    bad["input_ids"][1, 10] = 98
    good = labelled()
    good["input_ids"].clamp_(max=97)
    with pytest.raises(hlg.CalibrationError, match=r"batch 1: the pre-activations of bert\.encoder\.layer\.0\S* are not"):
        hlg.calibrate(model, [good, bad])
    x = torch.randn(2, 3, 5)
    x[1, 2] = math.nan
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert hlg.calibrate(Probe(), [{"inputs_embeds": x, "attention_mask": mask}]).sites[0].count == 25


def test_models_without_sites() -> None:
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no λ-GELU: call hf_lambda_gelu\.convert"):
        hlg.calibrate(tiny.build("bert-classifier"), [labelled()])
    with pytest.raises(ValueError, match="meta device"):
        hlg.calibrate(converted("bert-classifier").to("meta"), [labelled()])


def test_the_model_is_run_without_dropout_or_gradients() -> None:
    """In training mode the numbers are those of eval mode."""
    model = converted("bert-classifier")
    reference = hlg.calibrate(model, [labelled()])
    assert_same(reference, watched(hlg.calibrate, model, [labelled()]))
    probe = Probe().train()
    hlg.calibrate(probe, [{"inputs_embeds": torch.randn(1, 4)}] * 2)
    assert probe.modes == [(False, False)] * 2
    assert probe.training
