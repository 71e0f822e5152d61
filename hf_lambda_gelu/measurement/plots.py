"""Plots: the learned hardness over the layers, λ over training, and what the substitution of each layer costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sensitivity import SensitivityReport

_MOST_TICKS = 24  # sites; of more, no site has a tick


def plot_hardness(
    profile: Mapping[str, float],
    path: str | Path,
    history: Sequence[Mapping[str, Any]] = (),
    title: str = "Learned hardness",
) -> Path:
    """Writes a PNG with λ per site in network order and, if `history` holds it, λ per site over the training steps.

    Args:
        profile: {module name: λ}, as `hardness_profile` and `LambdaGELUTrainer.learned_hardness` give it.
        path: the PNG file to write.
        history: `trainer.state.log_history`.

    Raises:
        ImportError: matplotlib is missing (`pip install hf_lambda_gelu[plots]`).
        ValueError: the profile is empty.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2))
        >>> _ = hlg.convert(model, init_hardness=2.0)
        >>> path = hlg.plot_hardness(hlg.hardness_profile(model), "hardness.png")
    """
    if not profile:
        raise ValueError("the hardness profile is empty: nothing to plot")
    traces = _traces(history)
    figure, axes, colours = _figure(2 if traces else 1, len(profile))
    values = list(profile.values())
    axes[0].bar(range(len(values)), [value - 1.0 for value in values], bottom=1.0, color=colours)
    axes[0].axhline(1.0, color="black", linewidth=0.8)
    axes[0].set(title=title, xlabel="site, in network order", ylabel="λ   (1 = the smooth activation)")
    axes[0].set_ylim(bottom=1.0, top=max(1.01, 1.0 + 1.05 * (max(values) - 1.0)))
    if max(values) > 20:
        axes[0].set_yscale("log")
    if traces:
        for name, colour in zip(profile, colours, strict=True):
            if name in traces:
                steps, hardness = zip(*traces[name], strict=True)
                axes[1].plot(steps, hardness, color=colour, linewidth=1.2)
        axes[1].set_yscale("log")
        axes[1].set(title="λ over training, first site dark, last bright", xlabel="optimizer step", ylabel="λ")
        axes[1].grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return Path(path)


def plot_sensitivity(report: SensitivityReport, path: str | Path, title: str = "One site as ReLU at a time") -> Path:
    """Writes a PNG with what the substitution of each site costs, in network order, and its rank (1 costs least).

    Args:
        report: what `sensitivity` returned. The bars are the change of the loss if it has one, else of the outputs.
        path: the file to write.

    Raises:
        ImportError: matplotlib is missing (`pip install hf_lambda_gelu[plots]`).
        ValueError: the report is empty.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> report = hlg.sensitivity(model, batches)  # a converted model
        >>> path = hlg.plot_sensitivity(report, "sensitivity.png")
    """
    if not report.sites:
        raise ValueError("the sensitivity report is empty: nothing to plot")
    values = [site.relative_change if site.loss_change is None else site.loss_change for site in report.sites]
    figure, axes, colours = _figure(1, len(values))
    bars = axes[0].bar(range(len(values)), values, color=colours)
    axes[0].axhline(0.0, color="black", linewidth=0.8)
    label = "relative change of the outputs" if report.loss is None else f"change of the loss   (of {report.loss:.3g})"
    axes[0].set(title=title, xlabel="site, in network order", ylabel=label)
    if len(values) <= _MOST_TICKS:
        axes[0].set_xlabel("site, in network order   (at the bars: rank, 1 costs least)")
        axes[0].bar_label(bars, [str(site.rank) for site in report.sites], padding=2, fontsize=8, color="dimgrey")
        axes[0].margins(y=0.1)
    figure.savefig(path, dpi=120)
    return Path(path)


def _figure(columns: int, sites: int) -> tuple[Any, Any, list[Any]]:
    """A figure of so many axes, the axes, the first of them by site, and a colour for each site."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_lambda_gelu[plots]'") from error

    figure = Figure(figsize=(5.5 * columns, 3.8), layout="constrained")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    if sites <= _MOST_TICKS:
        axes[0].set_xticks(range(sites))
    return figure, axes, [colormaps["viridis"](i / max(1, sites - 1) * 0.9) for i in range(sites)]


def _traces(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    traces: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith("hardness/"):
                traces.setdefault(key.removeprefix("hardness/"), []).append((entry["step"], value))
    return traces
