"""The model card of a ReLU-ized checkpoint, rendered by huggingface_hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..reports import markdown_table
from ..structure.smooth_activations import Unconverted
from ..surgery.hinges.report import rounded_up
from ..surgery.report import SubstitutionReport
from .card_text import block, code, inline, paragraphs
from .redaction import cleaned_record

PAPER = "2603.21991"
REPORT_NAME = "lambda_gelu.json"
PLOT_NAME = "hardness_profile.png"
CARD_FILES = ("README.md", REPORT_NAME, PLOT_NAME)
_NOT_IN_OLDER: dict[str, Any] = {"compression": None, "warnings": [], "own_code": None, "llama_of": None}  # records


@dataclass
class CardDetails:
    """Holds what the card says beyond what the model itself knows; every field is optional.

    Attributes:
        base_model: Hub id of the model that was converted.
        dataset: Hub id or name of the training data.
        license: licence identifier of the Hub; a ReLU-ized model stays under its base model's licence.
        language: language codes.
        results: rows of the accuracy table, {"GELU, fine-tuned alike": {"accuracy": 0.84}, …}; metric values as fractions.
        final: the row of `results` that belongs to the published model: its metrics go into the card's metadata.
        command: the command that made the model.
        arguments: training arguments worth stating.
        notes: a paragraph in Markdown, such as limits.

    Options and arguments that are named like a secret (token, key, secret, password) and tokens of the Hub are left out of
    the card and of `lambda_gelu.json`; absolute paths are cut to their last name.

    Raises:
        ValueError: `final` is not a row of `results`, or a result is not a finite number.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> rows = {"GELU": {"accuracy": 0.84}, "ReLU": {"accuracy": 0.83}}
        >>> details = hlg.CardDetails(base_model="google-bert/bert-base-uncased", results=rows, final="ReLU")
    """

    base_model: str | None = None
    dataset: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    final: str | None = None
    command: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: str | None = None

    def __post_init__(self) -> None:
        if self.final is not None and self.final not in self.results:
            raise ValueError(f"final = {self.final!r} is not a row of results: {', '.join(self.results) or 'none given'}")
        self.results = {
            row: {metric: _finite(value, row, metric) for metric, value in metrics.items()}
            for row, metrics in self.results.items()
        }


def _finite(value: Any, row: str, metric: str) -> float:
    """The result as JSON can hold it: numpy's and torch's numbers are taken too."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"results[{row!r}][{metric!r}] = {value!r}: expected a finite number; leave out what has none")
    return number


def card_record(
    model_name: str,
    architecture: str,
    details: CardDetails,
    report: SubstitutionReport | None,
    left: list[Unconverted],
    pipeline_tag: str | None,
    versions: Mapping[str, str],
    learned: Mapping[str, float] | None = None,
    plot: str | None = None,
    compression: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    code: Mapping[str, Any] | None = None,
    llama_of: str | None = None,
) -> dict[str, Any]:
    """All that is known of a ReLU-ized model, as JSON can hold it: what `render_card` makes the card of."""
    record: dict[str, Any] = {
        "model_name": model_name,
        "architecture": architecture,
        "pipeline_tag": pipeline_tag,
        "details": asdict(details),
        "substitution": report.to_dict() if report else None,
        "left": [asdict(item) for item in left],
        "learned_hardness": learned,
        "plot": plot,
        "compression": compression,
        "warnings": list(warnings),
        "own_code": code,
        "llama_of": llama_of,
        "versions": versions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, everything else as text."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return str(value)


def render_card(record: Mapping[str, Any]) -> ModelCard:
    """Makes the card of a `card_record`, with metadata for the Hub; raises what huggingface_hub raises on bad values.

    Secrets and absolute paths do not reach it, see `cleaned_record`.
    """
    record = cleaned_record(record)
    details, report, task = record["details"], record["substitution"], record["pipeline_tag"]
    metrics = details["results"].get(details["final"], {})
    data = ModelCardData(
        model_name=record["model_name"],
        base_model=details["base_model"],
        license=details["license"],
        language=details["language"],
        datasets=[details["dataset"]] if details["dataset"] else None,
        metrics=sorted(metrics) or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["relu", "lambda-gelu", f"arxiv:{PAPER}", *(["custom_code"] if record.get("own_code") else [])],
        eval_results=[
            EvalResult(
                task_type=task or "other",
                dataset_type=details["dataset"] or "unknown",
                dataset_name=details["dataset"] or "unknown",
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ]
        or None,
    )
    erf = report is None or {site["base"] for site in report["sites"]} == {"gelu"}
    compensation = report and report["compensation"]
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=(files(__package__) / "templates" / "card.md").read_text(encoding="utf-8"),
        **{
            "compression": None,
            "warnings": [],
            "own_code": None,
            "llama_of": None,
            **record,
            "report": report,
        },  # older records lack these
        results_table=_results_table(details),
        formula="x Φ(λx)" if erf else "a(λx)/λ with a its own activation",
        sites_table=_sites_table(report) if report else "",
        wider=_wider(report["hinges"]) if report and report.get("hinges") else None,
        compensation_table=_compensation_table(compensation, bool(report.get("hinges"))) if compensation else "",
        paper=PAPER,
        inline=inline,
        paragraphs=paragraphs,
        code=code,
        block=block,
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)  # parts that were left out leave gaps
    return card


def _results_table(details: Mapping[str, Any]) -> str:
    results = details["results"]
    columns = list(dict.fromkeys(metric for row in results.values() for metric in row))
    rows = []
    for name, row in results.items():
        shown = f"**{inline(name)}**" if name == details["final"] else inline(name)
        rows.append([shown, *(f"{row[c]:.4f}" if c in row else "–" for c in columns)])
    return markdown_table(["", *map(inline, columns)], rows) if rows else ""


def _sites_table(report: Mapping[str, Any]) -> str:
    sites, zeros = report["sites"], report["zeros"]
    rows = [[code(s["name"]), s["base"], f"{s['hardness']:.4g}", f"{s['sup_error']:.2g}"] for s in sites]
    if not zeros:
        return markdown_table(["site", "gate", "λ", "bound"], rows)
    for row, site in zip(rows, sites, strict=True):
        row.append(f"{zeros[site['name']]:.1%}" if site["name"] in zeros else "–")
    return markdown_table(["site", "gate", "λ", "bound", "zeros"], rows)


def _wider(hinges: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of layers that hinges made wider: the width, k where it is one number, a row for sites alike."""
    sites = hinges["sites"]
    numbers = {number for site in sites for number, count in site["neurons"].items() if count}
    factors = [site["units"][1] / site["units"][0] for site in sites]
    rows: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        before, now = site["units"]
        counts = sorted((int(number), count) for number, count in site["neurons"].items() if count)
        bound = "–" if site["bound"] is None else f"{rounded_up(site['bound']):.3g}"
        said = (f"{before} → {now}", ", ".join(f"{count} with {number}" for number, count in counts), bound)
        rows.setdefault(said, []).append(site["name"])
    cells = [[_named(names), *(said if _bounded(sites) else said[:2])] for said, names in rows.items()]
    columns = ["site", "units", "neurons by ReLUs", *(["sup \\|f − Σ\\|"] if _bounded(sites) else [])]
    return {
        "count": len(sites),
        "each": next(iter(numbers)) if len(numbers) == 1 else None,
        "factor": f"{sum(factors) / len(factors):.4g}",
        "bounded": _bounded(sites),
        "widths": {path: (before, now) for path, (before, now) in hinges["widths"].items()},
        "table": markdown_table(columns, cells),
        "single": len(hinges["single"]),
        "reason": next(iter(hinges["single"].values()), ""),
    }


def _bounded(sites: Sequence[Mapping[str, Any]]) -> bool:
    """Whether hinges lie by minimax, with a bound for all inputs."""
    return all(site["bound"] is not None for site in sites)


def _named(names: Sequence[str]) -> str:
    """One name, or the first and the last of several with their number."""
    if len(names) == 1:
        return code(names[0])
    return f"{code(names[0])} … {code(names[-1])} ({len(names)})"


def _compensation_table(compensation: Mapping[str, Any], wider: bool) -> str:
    rows = [
        [code(s["weight"]), s["method"].replace("_", " "), f"{s['before']:.3f}", f"{s['after']:.3f}"]
        for s in compensation["sites"]
    ]
    return markdown_table(["refit", "method", "ReLUs as placed" if wider else "ReLU as it is", "refit"], rows)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record beside the card that is made of it, as JSON, whole or not at all; a link there is replaced.

    Secrets and absolute paths do not reach it, see `cleaned_record`.
    """
    text = json.dumps(cleaned_record(record), indent=2) + "\n"
    temporary = folder / f".{REPORT_NAME}.hf_lambda_gelu-partial"
    temporary.unlink(missing_ok=True)  # of a killed process
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / REPORT_NAME)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def package_versions() -> dict[str, str]:
    """Versions of what makes the result."""
    return {name: version(name) for name in ("hf_lambda_gelu", "transformers", "torch")}
