"""Plots of the hardness: the learned profile over the layers, and λ over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_hardness(
    profile: Mapping[str, float],
    path: str | Path,
    history: Sequence[Mapping[str, Any]] = (),
    title: str = "Learned hardness",
) -> Path:
    """Write a PNG with λ per site in network order and, if `history` holds it, λ per site over the training steps.

    Args:
        profile: {module name: λ}, as `hardness_profile` and `LambdaGELUTrainer.learned_hardness` give it.
        path: the file to write.
        history: `trainer.state.log_history`.

    Raises:
        ImportError: matplotlib is missing (`pip install hf_lambda_gelu[plots]`).
        ValueError: the profile is empty.
    """
    if not profile:
        raise ValueError("the hardness profile is empty: nothing to plot")
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_lambda_gelu[plots]'") from error

    traces = _traces(history)
    figure = Figure(figsize=(11 if traces else 5.5, 3.8), layout="constrained")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if traces else 1, squeeze=False)[0]
    colours = [colormaps["viridis"](i / max(1, len(profile) - 1) * 0.9) for i in range(len(profile))]

    values = list(profile.values())
    axes[0].bar(range(len(values)), [value - 1.0 for value in values], bottom=1.0, color=colours)
    axes[0].axhline(1.0, color="black", linewidth=0.8)
    axes[0].set(title=title, xlabel="site, in network order", ylabel="λ   (1 = the smooth activation)")
    axes[0].set_ylim(bottom=1.0, top=max(1.01, 1.0 + 1.05 * (max(values) - 1.0)))
    if max(values) > 20:
        axes[0].set_yscale("log")
    if len(values) <= 24:
        axes[0].set_xticks(range(len(values)))
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


def _traces(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    traces: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith("hardness/"):
                traces.setdefault(key.removeprefix("hardness/"), []).append((entry["step"], value))
    return traces
