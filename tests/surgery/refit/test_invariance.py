"""What makes no difference to a refit: padding, the size of batches, a chain in pieces, the mask of something else."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from support.models import converted, randomized
from support.states import largest_difference, parameters
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.chain_walk import ChainWalk, DependentError
from hf_lambda_gelu.surgery.refit.chains import Chain
from hf_lambda_gelu.surgery.refit.runs import ReplayError
from hf_lambda_gelu.surgery.refit.two_networks import TwoNetworks


def xlnet() -> PreTrainedModel:
    """Works on (length, batch)."""
    config = AutoConfig.for_model("xlnet", vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37)
    return randomized(AutoModelForCausalLM.from_config(config))


def padded_further(name: str, batch: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """The batch with a mask, padded by `more`: on the left for XLNet; decoders by their mask, or by labels of −100."""
    ids = batch.get("input_ids")
    if name == "whisper":
        labels = batch.pop("decoder_input_ids")
        labels[0, 4:] = -100
        return {**batch, "labels": F.pad(labels, (0, more), value=-100)}
    assert ids is not None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    side = (more, 0)
    if name != "xlnet":
        mask, side = mask.flip(1), (0, more)
    new = {"input_ids": F.pad(ids, side, value=7), "attention_mask": F.pad(mask, side)}
    if name == "t5":
        decoder = batch["decoder_input_ids"]
        mask = torch.ones_like(decoder)
        mask[1, 5:] = 0
        new |= {
            "decoder_input_ids": F.pad(decoder, (0, 2 * more), value=9),
            "decoder_attention_mask": F.pad(mask, (0, 2 * more)),
        }
    return new


@pytest.mark.parametrize("name", ["bert-classifier", "albert", "gpt2", "llama", "t5", "whisper", "xlnet"])
def test_padding(name: str) -> None:
    """Batches that are padded further give the same weights and the same report."""
    results = []
    for more in (0, 5):
        model = xlnet() if name == "xlnet" else converted(name)
        batches = [padded_further(name, tiny.inputs(model, seed), more) for seed in range(6)]
        report = hlg.relu_ize(model, calibration=batches, compensate="least_squares").compensation
        assert report is not None
        assert any(site.method != "none" for site in report.sites)
        results.append((parameters(model), report.sites))
    (first, sites), (second, others) = results
    assert largest_difference(first, second) < 2e-4
    for a, b in zip(sites, others, strict=True):
        assert (a.name, a.rows, a.method) == (b.name, b.rows, b.method)
        assert (a.before, a.after) == pytest.approx((b.before, b.after), rel=1e-3)


@pytest.mark.parametrize("name", ["bert-classifier", "vit", "xlnet"])
def test_batch_size(name: str) -> None:
    """The same examples in batches of one, of three and all at once: the same weights."""
    states = []
    for size in (1, 3, 12):
        model = xlnet() if name == "xlnet" else converted(name)
        examples = [{k: v[i : i + 1] for k, v in tiny.inputs(model, seed).items()} for seed in range(6) for i in range(2)]
        groups = [examples[i : i + size] for i in range(0, 12, size)]
        batches = [{k: torch.cat([e[k] for e in group]) for k in group[0]} for group in groups]
        hlg.relu_ize(model, calibration=batches, compensate="least_squares")
        states.append(parameters(model))
    assert largest_difference(states[0], states[1]) < 1e-3
    assert largest_difference(states[0], states[2]) < 1e-3


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "t5"])
def test_split_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains block by block, which run the whole network for each, give the same weights as chains that carry states."""

    def walk(networks: TwoNetworks, chain: Chain) -> ChainWalk:
        if len(chain.blocks) > 1:
            raise DependentError
        return ChainWalk(networks, chain)

    states = []
    for split in (False, True):
        if split:
            monkeypatch.setattr(engine, "ChainWalk", walk)
        model = converted(name)
        hlg.relu_ize(model, calibration=calibration_set(model), compensate="least_squares")
        states.append(parameters(model))
    assert largest_difference(*states) < 1e-4


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "t5", "swin", "electra"])
def test_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no block can be run apart, the whole model is run, and the weights are the same."""

    def walk(networks: TwoNetworks, chain: Chain) -> ChainWalk:
        if chain.blocks != [""]:
            raise ReplayError
        return ChainWalk(networks, chain)

    states, reports = [], []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(engine, "ChainWalk", walk)
        model = converted(name)
        report = hlg.relu_ize(model, calibration=calibration_set(model, 24), compensate="least_squares").compensation
        assert report is not None
        states.append(parameters(model))
        reports.append([(site.name, site.rows, site.method, site.target) for site in report.sites])
    assert reports[0] == reports[1]
    assert largest_difference(*states) < 1e-4


@pytest.mark.parametrize(
    ("name", "mask", "rows"),
    [("clip", (2, 11), {"text": 5 * 19, "vision": 5 * 2 * 17}), ("wav2vec2", (2, 400), {"wav2vec2": 5 * (39 + 38)})],
)
def test_mask_of_something_else(name: str, mask: tuple[int, int], rows: dict[str, int]) -> None:
    """A mask of text says nothing of patches beside it, which all count; one of samples says which frames are padding:
    of 400 samples kernels of 10 and 3 at strides of 5 and 2 make 39 frames, of 397 they make 38.
    """
    model = converted(name)
    batches = [tiny.inputs(model, seed) for seed in range(5)]
    for batch in batches:
        batch["attention_mask"] = torch.ones(mask, dtype=torch.long)
        batch["attention_mask"][1, -3:] = 0
    report = hlg.relu_ize(model, calibration=batches, compensate="bias").compensation
    assert report is not None
    assert len(report.sites) > 2
    for site in report.sites:
        assert site.rows == next(count for part, count in rows.items() if site.name.startswith(part))
        assert site.method == "bias"
