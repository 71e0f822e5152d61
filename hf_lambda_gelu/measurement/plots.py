"""Plots: the learned hardness over the layers, λ and the ReLU gap over training, and what substituting each layer costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from .run_history import RunHistory, read_run, relu_gaps, traces

if TYPE_CHECKING:
    from .sensitivity import SensitivityReport

_MOST_TICKS = 24  # sites; of more, not each has a tick
_WIDE = 10.0  # λ that differ by such a factor are shown on a log axis
_MOST_GAPS = 6  # metrics in one plot


@overload
def plot_hardness(
    profile: Mapping[str, float],
    path: str | os.PathLike[str],
    history: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
) -> Path: ...


@overload
def plot_hardness(
    profile: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Path: ...


@overload
def plot_hardness(
    profile: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path: ...


def plot_hardness(
    profile: Mapping[str, float] | str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
) -> Path:
    """Writes a PNG: λ per site in network order and, where a history is known, λ and the ReLU gap over the steps.

    The ReLU gap of a metric is `eval_relu_x − eval_x`: with the gates as ReLU, minus with the gates as they are.

    Args:
        profile: one of

            - the folder of a run, of which the newest checkpoint is read, or of a checkpoint. λ per site is as learned, at
              the switch, or as logged last where the run has not come to it;
            - `trainer.state.log_history`. λ per site is as logged last;
            - {module name: λ}, as `hardness_profile` and `LambdaGELUTrainer.learned_hardness` give it.

        path: the PNG file to write; of a folder, by default `hardness.png` in it.
        history: with {module name: λ}, `trainer.state.log_history` for what goes over the steps.
        title: of λ per site.

    Returns:
        The path of the file.

    Raises:
        ImportError: matplotlib is missing (`pip install hf_lambda_gelu[plots]`).
        ValueError: there is no λ in what was given, no `trainer_state.json` in the folder, or no path.
        TypeError: `profile` is none of the three.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2))
        >>> _ = hlg.convert(model, init_hardness=2.0)
        >>> path = hlg.plot_hardness(hlg.hardness_profile(model), "hardness.png")
        >>> path = hlg.plot_hardness("runs/bert")  # doctest: +SKIP
    """
    if isinstance(profile, (str, os.PathLike)):
        if history:
            raise ValueError(
                "history is that of the folder: give either the folder of a run, or {module name: λ} and history"
            )
        run = read_run(profile)
        path = Path(profile, "hardness.png") if path is None else path
        return _of_a_run(run, path, title, f"in {str(profile)!r}")
    if isinstance(profile, Mapping):
        if not profile:
            raise ValueError("the hardness profile is empty: nothing to plot")
        return _saved(hardness_figure(profile, history, title or "Learned hardness"), path)
    entries = [entry for entry in profile if isinstance(entry, Mapping)] if isinstance(profile, Sequence) else None
    if entries is not None and len(entries) == len(profile):
        if history:
            raise ValueError("profile is a history already: give {module name: λ} first, or no history")
        return _of_a_run(RunHistory(entries), path, title, "in this history")
    raise TypeError(
        f"expected the folder of a run, trainer.state.log_history or {{module name: λ}}, got {type(profile).__name__}"
    )


def hardness_figure(profile: Mapping[str, float], history: Sequence[Mapping[str, Any]], title: str) -> Any:
    """The figure of `plot_hardness`."""
    over_steps, gaps = traces(history), relu_gaps(history)
    figure, axes, colours = _figure(1 + bool(over_steps) + bool(gaps), len(profile))
    _draw_profile(axes[0], list(profile.values()), colours, title)
    if over_steps:
        _draw_traces(axes[1], [over_steps.get(name, []) for name in profile], colours)
    if gaps:
        _draw_gaps(axes[-1], gaps)
    return figure


def _of_a_run(run: RunHistory, path: str | os.PathLike[str] | None, title: str | None, where: str) -> Path:
    profile, last = run.learned or run.last, max([run.step, *(entry.get("step", 0) for entry in run.history)])
    if not profile:
        raise ValueError(
            f"there is no λ {where}: {len(run.history)} log entries, none with hardness/<module>. LambdaGELUTrainer "
            "logs them every logging_steps"
        )
    default = "λ as learned, at the switch" if run.learned else f"λ as logged last, by step {last}"
    return _saved(hardness_figure(profile, run.history, title or default), path)


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        raise ValueError("path is missing: give the PNG file to write (it has a default only for the folder of a run)")
    figure.savefig(path, dpi=120)
    return Path(path)


def _draw_profile(axes: Any, values: list[float], colours: list[Any], title: str) -> None:
    axes.bar(range(len(values)), [value - 1.0 for value in values], bottom=1.0, color=colours)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="site, in network order", ylabel="λ   (1 = the smooth activation)")
    axes.set_ylim(bottom=1.0, top=max(1.01, 1.0 + 1.05 * (max(values) - 1.0)))
    if max(values) > 2 * _WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def _draw_traces(axes: Any, sites: list[list[tuple[int, float]]], colours: list[Any]) -> None:
    named = {0, len(sites) // 2, len(sites) - 1}
    for index, (trace, colour) in enumerate(zip(sites, colours, strict=True)):
        if trace:
            steps, hardness = zip(*trace, strict=True)
            marker = "o" if len(trace) == 1 else None
            axes.plot(steps, hardness, color=colour, linewidth=1.2, marker=marker, label=f"site {index}" * (index in named))
    values = [value for trace in sites for _, value in trace]
    if values and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(title="λ over training", ylabel="λ")
    _over_steps(axes, [step for trace in sites for step, _ in trace])


def _draw_gaps(axes: Any, gaps: Mapping[str, list[tuple[int, float]]]) -> None:
    for name, gap in list(gaps.items())[:_MOST_GAPS]:
        axes.plot(*zip(*gap, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(title="ReLU gap over training", ylabel="metric with ReLU − with λ-GELU")
    _over_steps(axes, [step for gap in gaps.values() for step, _ in gap])


def _over_steps(axes: Any, steps: list[int]) -> None:
    axes.set(xlabel="optimizer step", xlim=(0, 1.03 * max([1, *steps])))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


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
    else:
        axes[0].xaxis.get_major_locator().set_params(integer=True)
    return figure, axes, [colormaps["viridis"](i / max(1, sites - 1) * 0.9) for i in range(sites)]
