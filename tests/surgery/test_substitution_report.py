"""What a reader of the report is told to do."""

from __future__ import annotations

import pytest

from hf_lambda_gelu.surgery.hinges.report import HingeReport
from hf_lambda_gelu.surgery.refit.report import CompensatedSite, CompensationReport
from hf_lambda_gelu.surgery.report import SubstitutedSite, SubstitutionReport


@pytest.mark.parametrize(
    ("left", "hinges", "told"),
    [
        ([0.9, 0.2, 0.6], None, True),
        ([0.9, 0.2, 0.4], None, False),
        ([0.9, 0.8, 0.6], HingeReport(), False),
        ([], None, False),
    ],
)
def test_more_hinges_are_named_where_one_does_not_do(left: list[float], hinges: HingeReport | None, told: bool) -> None:
    """At most sites more than half of the output is missing, and layers are as wide as before."""
    sites = [SubstitutedSite(f"site{n}", "silu", 1.0, 0.28) for n in range(3)]
    refit = [CompensatedSite(f"site{n}", "w", "least_squares", "stream", 9, 1.0, after) for n, after in enumerate(left)]
    report = SubstitutionReport(sites, 0.005, hinges=hinges, compensation=CompensationReport(refit))
    assert ("hinges=2" in str(report)) == told
