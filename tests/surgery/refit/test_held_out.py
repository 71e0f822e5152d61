"""Few rows, one example, nothing to judge by: what is fitted then, and what is said."""

from __future__ import annotations

import logging

import pytest
import torch
from support import tiny
from support.calibration import calibration_set
from support.models import converted
from support.states import largest_difference, parameters

import hf_lambda_gelu as hlg


def test_few_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Few rows for the rank of the features are said for each site and warned of once; with many there is no warning."""
    for count, few in ((2, True), (40, False)):
        caplog.clear()
        model = converted("bert-classifier")
        with caplog.at_level(logging.WARNING):
            report = hlg.relu_ize(model, calibration=calibration_set(model, count), compensate="least_squares").compensation
        assert report is not None
        warnings = [r.getMessage() for r in caplog.records if "few rows" in r.getMessage()]
        noted = [site for site in report.sites if "few rows" in site.note]
        assert len(warnings) == few
        if few:
            assert noted
            assert warnings[0].startswith(f"{len(noted)} of 2 sites were refit from few rows")
            assert noted[0].name in warnings[0]
            assert f"few rows: {noted[0].rows} for an effective rank of {noted[0].effective_rank:.0f}" in str(report)
        else:
            assert not noted


def test_one_example() -> None:
    """A single example is fitted on four fifths of its tokens and judged by the rest; a single token is too little."""
    model = converted("bert-classifier")
    batch = {k: v[:1] for k, v in tiny.inputs(model).items()}
    report = hlg.relu_ize(model, calibration=[batch], compensate="bias").compensation
    assert report is not None
    assert [(site.rows, site.method) for site in report.sites] == [(11, "bias")] * 2
    assert all(site.after < site.before for site in report.sites)

    model = converted("bert-classifier")
    before = parameters(model)
    report = hlg.relu_ize(model, calibration=[{"input_ids": torch.tensor([[5]])}], compensate="least_squares").compensation
    assert report is not None
    for site in report.sites:
        assert (site.rows, site.method) == (1, "none")
        assert site.before == site.after > 0.0
        assert "at least two examples that are not padding are needed" in site.note
    assert largest_difference(before, parameters(model)) == 0.0


def test_nothing_to_judge_by() -> None:
    """Three examples of which the one that would be held out is only padding: nothing is refit, and it is said."""
    model = converted("bert-classifier")
    before, ids = parameters(model), torch.randint(3, 99, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    report = hlg.relu_ize(model, calibration=[batch], compensate="least_squares").compensation
    assert report is not None
    for site in report.sites:
        assert (site.rows, site.method, site.before, site.after) == (22, "none", 0.0, 0.0)
        assert "no rows to fit and to judge by" in site.note
    assert largest_difference(before, parameters(model)) == 0.0
