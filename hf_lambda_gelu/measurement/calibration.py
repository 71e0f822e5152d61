"""`calibrate`: how far every λ-GELU is from ReLU on the pre-activations that it really sees, and which λ is near enough.

All of it is derived; the paper (arXiv 2603.21991) has no target from data as far as we know. With
D(x; λ) = f(x; λ) − ReLU(x) = −|x| gate(−λ|x|), since every gate has gate(−u) = 1 − gate(u), the error of a site is
E[D²] relative to E[ReLU²]: it depends on λ · std(x), which differs from layer to layer, and not on λ alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activation.bases import get_base
from ..activation.hardness import DEFAULT_RELATIVE_TOLERANCE, check_hardness, check_relative_tolerance, target_hardness
from ..activation.module import LambdaGELU, hardness_profile, hardness_sites
from ..reports import finite_or_none, progress, table, to_dict
from ..structure.forwards import foreign_forwards
from ..structure.offloading import check_not_offloaded
from ..structure.sharding import check_by_blocks
from ..structure.transaction import transaction
from .batches import CalibrationError, check_dealt, model_batches
from .forward import measuring, run_batch
from .in_effect import check_in_effect, counting_calls
from .places import Places
from .site_rows import Count, SiteRows
from .team import Processes, Team, team_of
from .whole_blocks import whole_blocks

# A histogram of log2|x|. Its lowest bin is for 0 and what fp32 has as subnormal, taken as 0; in its highest, |x| ≥ 2¹⁰,
# every gate is 0 or 1 at any λ ≥ 1. A bin's width displaces |x| by a factor of at most 2^(1/128).
_BINS_PER_OCTAVE = 64
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -126, 10
_BINS = (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE
_PLACES = torch.arange(_BINS, dtype=torch.float64, device="cpu")
_MAGNITUDES = torch.exp2(_LOWEST_OCTAVE + (_PLACES + 0.5) / _BINS_PER_OCTAVE)
_MAGNITUDES[0] = 0.0
_PIECE_ELEMENTS = 1 << 22  # 32 MiB in fp64
_MAX_HARDNESS = 1e30  # what `LambdaGELU.set_hardness` takes


@dataclass(frozen=True)
class SiteStatistics:
    """The pre-activations x of one site, over all calls, batches, tokens and features.

    Attributes:
        name, base, hardness: the module, its gate, and λ when it was measured.
        count: number of elements; 0 if no batch reached the site, and then the statistics are NaN.
        mean, std: of x, in its own units; std with 1/count.
        negative: fraction of x < 0, in [0, 1].
        relu_square: mean of ReLU(x)².
        histogram: counts of log2|x| in 64 bins an octave from 2⁻¹²⁶ to 2¹⁰, fp64, shape (8704,).
        tokens, padding: rows of x (tokens, patches) that count, and rows that do not, as they are padding; None for the
            second where the batches' mask fits nothing that the site works on, and all rows count.

    Examples:
        >>> site = hlg.calibrate(model, batches).sites[0]  # import hf_lambda_gelu as hlg; a converted model
        >>> site.relative_error(100.0), site.target_hardness(0.01)
    """

    name: str
    base: str
    hardness: float
    count: int
    mean: float
    std: float
    negative: float
    relu_square: float
    histogram: Tensor = field(repr=False, compare=False)
    tokens: int = 0
    padding: int | None = 0

    def relative_error(self, hardness: float) -> float:
        """√(E[(f(x; λ) − ReLU(x))²] / E[ReLU(x)²]) at λ = `hardness`, dimensionless. [derived]

        The denominator is ReLU's, not f's: it does not depend on λ, so the error falls in λ for any distribution of x. The
        histogram displaces λ and the result by 0.6 % each at most; over many values that averages out to 1e-4 or less.
        Infinite where ReLU is 0 throughout and f is not; NaN without pre-activations.

        Raises:
            ValueError: λ is not a number from 1 to 1e30.
        """
        hardness = check_hardness(hardness)
        if not self.count:
            return math.nan
        filled = self.histogram > 0
        counts, x = self.histogram[filled], _MAGNITUDES[filled]
        square = float((counts * (x * get_base(self.base).gate(x * -hardness)).square()).sum()) / self.count
        if square == 0.0:
            return 0.0
        return math.sqrt(square / self.relu_square) if self.relu_square else math.inf

    def target_hardness(self, tolerance: float = DEFAULT_RELATIVE_TOLERANCE) -> float:
        """The smallest λ ≥ 1 with `relative_error(λ)` ≤ `tolerance`, by bisection in log λ; at most 1e30. [derived]

        Where ReLU is 0 throughout, that is where f is 0 too, to fp64's accuracy. A site without pre-activations gets
        `activation.hardness.target_hardness` at its default, the target that knows no data.

        Raises:
            ValueError: the tolerance is not a finite number > 0.
        """
        check_relative_tolerance(tolerance)
        if not self.count:
            return target_hardness(base=self.base)
        if self.relative_error(1.0) <= tolerance:
            return 1.0
        soft, hard = 0.0, math.log(_MAX_HARDNESS)
        while hard - soft > 1e-9:
            middle = (soft + hard) / 2
            within = self.relative_error(math.exp(middle)) <= tolerance
            soft, hard = (soft, middle) if within else (middle, hard)
        return min(math.exp(hard), _MAX_HARDNESS)


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` measured. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        sites: in network order, a `SiteStatistics` each.

    Examples:
        >>> report = hlg.calibrate(model, batches)  # import hf_lambda_gelu as hlg; a converted model
        >>> report.targets(0.01)  # {module name: λ at which ReLU is within 1 %}
    """

    sites: list[SiteStatistics]

    def targets(self, tolerance: float = DEFAULT_RELATIVE_TOLERANCE) -> dict[str, float]:
        """{module name: the λ at which its relative error is `tolerance`}; see `SiteStatistics.target_hardness`."""
        return {site.name: site.target_hardness(tolerance) for site in self.sites}

    def to_dict(self) -> dict[str, Any]:
        """Per site the statistics, the relative error as ReLU and λ for 1 %; None for what is not a finite number."""
        sites = []
        for site in self.sites:
            entry = to_dict(site)
            entry["relative_error"] = site.relative_error(site.hardness)
            entry["hardness_for_1_percent"] = site.target_hardness(0.01)
            sites.append({name: finite_or_none(value) for name, value in entry.items()})
        return {"sites": sites}

    def __str__(self) -> str:
        header = ["site", "λ", "tokens", "padding", "mean", "std", "% < 0", "λ·std", "error as ReLU", "λ for 1 %"]
        cells = []
        for s in self.sites:
            row = [s.name, f"{s.hardness:.4g}"]
            if s.count:
                row += [str(s.tokens), "?" if s.padding is None else str(s.padding)]
                row += [f"{s.mean:.3g}", f"{s.std:.3g}", f"{100 * s.negative:.1f}", f"{s.hardness * s.std:.4g}"]
                row += [f"{100 * s.relative_error(s.hardness):.3g} %", f"{s.target_hardness(0.01):.4g}"]
            else:
                row.append("no batch reached it")
            cells.append(row)
        lines = table(header, [">9", ">8", ">7", ">9", ">9", ">6", ">9", ">13", ">9"], cells)
        return "\n".join([f"pre-activations of {len(self.sites)} activations", *lines])


def calibrate(model: nn.Module, dataloader: Iterable[Any], *, processes: Processes | None = None) -> CalibrationReport:
    """Measures the pre-activations of every λ-GELU of `model`, with its present λ, in one pass over `dataloader`.

    By site: count, mean, std, fraction of x < 0, mean of ReLU(x)² and a histogram of log2|x|, summed in fp64 whatever dtype
    the model has. From these, √(E[(f(x; λ) − ReLU(x))²] / E[ReLU(x)²]) at any λ. [derived]
    The model is run in eval mode without gradients and left as it was. Padding does not count where the attention mask fits
    what the site works on (tokens). Memory does not grow with the number of batches.

    Args:
        model: a converted model.
        dataloader: batches, mappings of what the model's forward takes, like those that it will see; some dozens of examples
            are enough, and labels are not needed.
        processes: "all" joins the processes of torch.distributed: each passes its own share of the batches, and gets the
            report on all batches. Else this process measures what it is given.

    Raises:
        ValueError: the model has no λ-GELU, or is on the meta device or offloaded.
        CalibrationError: a loader that yields nothing usable (see `batches.model_batches`), a forward that raises,
            pre-activations that are not finite, or a fused kernel that runs in a site's place; the message names the batch
            and the site.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import AutoModelForSequenceClassification, AutoTokenizer
        >>> name = "textattack/bert-base-uncased-SST-2"
        >>> model = AutoModelForSequenceClassification.from_pretrained(name)
        >>> batch = AutoTokenizer.from_pretrained(name)(["a good film", "a dull film"], padding=True, return_tensors="pt")
        >>> _ = hlg.convert(model)
        >>> print(hlg.calibrate(model, [batch]))
    """
    return calibrate_by(model, dataloader, team_of(processes, model))


@transaction
@torch.no_grad()
def calibrate_by(model: nn.Module, dataloader: Iterable[Any], team: Team, in_run: bool = False) -> CalibrationReport:
    """`calibrate` by a team, of which each process has its own share of the batches; `in_run` as for `evaluating`."""
    with team.whole():
        if team.size > 1:
            check_by_blocks(model, "processes='all'", "pass the same batches to each, and processes='one'")
        with whole_blocks(model, team) if team.size > 1 else contextlib.nullcontext():
            return _measured(model, dataloader, team, in_run)


def _measured(model: nn.Module, dataloader: Iterable[Any], team: Team, in_run: bool) -> CalibrationReport:
    sites, profile = calibration_sites(model), hardness_profile(model)
    called: set[str] = set()
    first: list[Mapping[str, Any]] = []
    running = {name: _RunningStatistics() for name in sites}
    index = 0

    def take(name: str, x: Tensor, _: Places) -> None:
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"calibration batch {index}: the pre-activations of {name} are not finite. Look for an overflow of half "
                "precision, or for weights or inputs that are NaN"
            )
        for piece in pieces(x):
            running[name].add(piece)

    rows = SiteRows(model, sites, take)
    with measuring(model, in_run):
        for index, batch in enumerate(_batches(model, dataloader, team)):
            with rows.counting(batch), counting_calls(model, called):
                run_batch(model, batch, index)
            first = first or [batch]
        # hooks were on in every run here, so that nothing but a forward of another kind can be in the way
        native = {name for name in sites if not foreign_forwards(model, name)}
        called.update(*team.gathered(called, "the sites that ran"))
        if first:
            check_in_effect(model, called | native, lambda: run_batch(model, first[0], 0))
    _join(running, rows.counts, team)
    return CalibrationReport([s.of(n, sites[n].base, profile[n], rows.counts[n]) for n, s in running.items()])


def _batches(model: nn.Module, loader: Iterable[Any], team: Team) -> Iterator[Mapping[str, Any]]:
    check_dealt(loader, team)
    return model_batches(model, progress(loader, "calibration"), team)


def _join(running: dict[str, _RunningStatistics], counts: dict[str, Count], team: Team) -> None:
    """Let each site's statistics be those of all processes: the same sums in the same order on each."""
    if team.size == 1:
        return
    for other, others in enumerate(team.gathered((running, counts), "the statistics of all sites")):
        for name, statistics in others[0].items():
            if other == 0:
                running[name], counts[name] = statistics, others[1][name]
            else:
                running[name].join(statistics)
                counts[name].join(others[1][name])


def calibration_sites(model: nn.Module) -> dict[str, LambdaGELU]:
    """`hardness_sites(model)`; ValueError if there are none or their λ has no value."""
    sites = hardness_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no λ-GELU: call hf_lambda_gelu.convert(model) first")
    check_not_offloaded(model)
    if any(site.unclipped_hardness.is_meta for site in sites.values()):
        raise ValueError("the model is on the meta device, where nothing can be measured: load its weights first")
    return sites


def pieces(x: Tensor) -> Iterator[Tensor]:
    """The elements of x in order, fp64, so many at once that memory does not matter; MPS has no fp64."""
    for piece in torch.split(x.reshape(-1), _PIECE_ELEMENTS):
        if piece.numel():
            yield (piece.cpu() if piece.device.type == "mps" else piece).double()


class _RunningStatistics:
    """Statistics of elements that arrive piece by piece; mean and variance by Chan's update, which does not cancel."""

    def __init__(self) -> None:
        self.count = self.negative = 0
        self.mean = self.squares = self.relu_squares = 0.0
        self.histogram = torch.zeros(_BINS, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Takes in the elements of x, fp64."""
        mean, total = float(x.mean()), self.count + x.numel()
        shift = mean - self.mean
        self.squares += float((x - mean).square().sum()) + shift * shift * self.count * x.numel() / total
        self.mean += shift * x.numel() / total
        self.count = total
        self.negative += int((x < 0).sum())
        self.relu_squares += float(x.relu().square().sum())
        # counts, not sums of weights: integers add up to the same on every device and in every order
        bins = ((x.abs().log2() - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE).floor().clamp(0, _BINS - 1).long()
        self.histogram += bins.bincount(minlength=_BINS).cpu()

    def join(self, other: _RunningStatistics) -> None:
        """Takes in what another process has seen."""
        total = self.count + other.count
        if other.count:
            shift = other.mean - self.mean
            self.squares += other.squares + shift * shift * self.count * other.count / total
            self.mean += shift * other.count / total
        self.count = total
        self.negative += other.negative
        self.relu_squares += other.relu_squares
        self.histogram += other.histogram

    def of(self, name: str, base: str, hardness: float, seen: Count) -> SiteStatistics:
        n = self.count or math.nan
        values = self.mean * n / n, math.sqrt(self.squares / n), self.negative / n, self.relu_squares / n
        padding = seen.padding if seen.told else None
        return SiteStatistics(name, base, hardness, self.count, *values, self.histogram, seen.tokens, padding)
