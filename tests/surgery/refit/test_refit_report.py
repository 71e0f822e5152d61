"""The printed report of a refit."""

from __future__ import annotations

from support.calibration import calibration_set
from support.models import converted

import hf_lambda_gelu as hlg


def test_report() -> None:
    """The printed table has a row for each site, the biases that were added, and what could not be refit with the reason."""
    model = converted("modernbert")
    report = hlg.relu_ize(model, calibration=calibration_set(model, 12), compensate="least_squares").compensation
    assert report is not None
    lines = str(report).splitlines()
    assert lines[0].startswith("2 sites compensated in ")
    assert lines[1].split() == ["site", "method", "target", "rows", "padding", "before", "after"]
    for site, line in zip(report.sites, lines[2:], strict=False):
        numbers = [f"{site.before:.3f}", f"{site.after:.3f}"]
        assert line.split() == [site.name, site.method, "stream", str(site.rows), "0", *numbers]
    assert lines[4:] == [
        "  config.mlp_bias is True now: the maps had no bias, and it gives them one",
        "  head.act not compensated: the weight that it feeds is shared with decoder.weight",
    ]
    assert report.seconds > 0.0
