"""`convert_checkpoint` and `relu_ize_checkpoint`: saved folders of any size, without their weights in memory.

The model is loaded onto the meta device, is converted or substituted as any other, and saves its config and its few λ. The
weights are files, which stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..activation.hardness import DEFAULT_TOLERANCE
from ..activation.module import hardness_sites
from ..activation.older_checkpoints import NAME, OLDER
from ..structure.loading import CheckpointError, save_parts
from ..structure.scratch import scratch_folder
from ..structure.transaction import transaction
from ..surgery.conversion import ConversionReport, convert
from ..surgery.hinges.wanted import check_hinges
from ..surgery.refit.report import Compensate
from ..surgery.report import SubstitutionReport
from ..surgery.substitutable import check_options
from ..surgery.substitution import relu_ize
from .card import CARD_FILES, CardDetails
from .folders import whole_folder
from .on_disk_files import Source, WrittenFiles
from .on_disk_refit import Asked, refit_streamed, usable_device
from .save import write_card
from .shards import Shard
from .streamed_model import Streamed


@dataclass(frozen=True)
class CheckpointReport:
    """Says what `convert_checkpoint` or `relu_ize_checkpoint` did to the model, and to the files. Printing it gives both.

    Attributes:
        folder: the folder that was made.
        model: the report of `convert` or `relu_ize`: the sites and their λ.
        linked, copied, rewritten: names of the weight files that are the source's own, a copy, or one without its λ.
        bytes_written: size of all files that were written; links need none.

    Examples:
        >>> report = hlg.convert_checkpoint("models/bert", "models/bert-lambda")  # doctest: +SKIP
        >>> report.linked  # doctest: +SKIP
        ('model-00001-of-00002.safetensors',)
    """

    folder: Path
    model: ConversionReport | SubstitutionReport
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    rewritten: tuple[str, ...]
    bytes_written: int

    def __str__(self) -> str:
        counts = {"linked": self.linked, "copied": self.copied, "rewritten without λ": self.rewritten}
        files = ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names)
        return f"{self.model}\nweight files in {str(self.folder)!r}: {files}; {self.bytes_written:,} bytes written in all"


@transaction
def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    init_hardness: float = 1.0,
    *,
    only: Callable[[str, nn.Module], bool] | None = None,
    link: bool = True,
    trust_remote_code: bool = False,
) -> CheckpointReport:
    """Makes of the folder of a GELU or SiLU checkpoint that of the λ-GELU model: config rewritten, λ added in a small file.

    It holds what `convert(model)` and `model.save_pretrained(dst)` write, without loading the weights: memory does not grow
    with the checkpoint. Tokenizer, processor, card and nested folders come along, pickles and a Trainer's state do not.
    `dst` appears when it is complete; what a killed process leaves beside it, the next call removes.

    The weight files of `dst` are hard links where the file system has them: the same bytes under a second name, at no cost.
    A program that changes such a file in place changes `src` too.

    Args:
        src: folder with config.json and safetensors, one file or shards with an index, of a class that transformers exports.
        dst: the folder to make; not in `src`.
        init_hardness, only: as for `convert`. The modules that `only` sees are on the meta device.
        link: False copies the weight files, so that `dst` can be changed in place.
        trust_remote_code: run code of its own that `src` has, which then comes along. Without it such a folder is refused.

    Returns:
        The report of `convert`, and what became of the files.

    Raises:
        CheckpointError: `src` is no such folder, is a Hub name, or holds pickles only; files are missing or damaged; there
            is no room for a copy; code that is not trusted.
        ConversionError: as `convert` raises it.
        ValueError: `dst` is in use or cannot be written, or a bad `init_hardness`.

    In every case `src` is as it was and `dst` is not made.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> BertModel(BertConfig(num_hidden_layers=1)).save_pretrained("models/bert")
        >>> print(hlg.convert_checkpoint("models/bert", "models/bert-lambda"))  # doctest: +ELLIPSIS
        converted 1 activations to λ-GELU at λ = 1
        ...
    """
    source = Source(src, dst, trust_remote_code=trust_remote_code)
    model = source.load()
    report = convert(model, init_hardness, only=only)
    for site in hardness_sites(model).values():
        site.to_empty(device="cpu").reset_parameters()
    with whole_folder(source.target) as temporary:
        hardness = save_parts(model, temporary, _hardness(model))
        there = [name for shard in source.shards for name in shard.tensors if name in hardness]
        if there:
            raise CheckpointError(
                f"the weights hold {there[0]} already, of which {CONFIG_NAME} says nothing: restore the config that they "
                "were saved with"
            )
        links = source.carry_along(temporary, (), link)
        written = source.finish(temporary, model, links, added=hardness, link=link)
    return _report(source, report, written)


@transaction
def relu_ize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    force: bool = False,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    targets: Mapping[str, float] | None = None,
    calibration: Iterable[Any] | None = None,
    compensate: Compensate | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    hinges: int = 1,
    budget: float | None = None,
    device: str | torch.device = "cpu",
    details: CardDetails | None = None,
    link: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> CheckpointReport:
    """Makes of the folder of a λ-GELU checkpoint that of the ReLU model, which stock transformers loads.

    It holds what `relu_ize(model)` and `save_relu_pretrained(model, dst)` write, made as `convert_checkpoint` makes its own:
    unchanged weight files are hard links. With `calibration` or `hinges` the model, GELU or λ-GELU, runs with one block of
    weights in memory; after a kill the same call goes on where it was.

    Args:
        src, dst: folder of a λ-GELU checkpoint in safetensors, by whomever it was saved; the folder to make, not in `src`.
        force, tolerance, targets, calibration, compensate, compute_metrics, hinges, budget: as for `relu_ize`.
        device, details: where blocks run, and what lies outside of them is; what the model card, a new one, should say.
        link, overwrite: False copies the weight files; True puts `dst` in the place of a saved model that is there.
        trust_remote_code: run code of its own that `src` has, which then comes along. Without it such a folder is refused.

    Returns:
        The report of `relu_ize`, and what became of the files.

    Raises:
        CheckpointError: as for `convert_checkpoint`; λ of sites that the model lacks; no room; weights that change meanwhile
            or are merged in the model (Mixtral's experts); a killed process's work with other data. `dst` is not made.
        CalibrationError, ConversionError, HingeError, SoftGateError, ValueError: as for `convert` and `relu_ize`; no such
            device, or `dst` cannot be made.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> BertModel(BertConfig(num_hidden_layers=1, hidden_act="lambda_gelu")).save_pretrained("runs/hard")  # λ = 1: force
        >>> print(hlg.relu_ize_checkpoint("runs/hard", "runs/hard-relu", force=True))  # doctest: +ELLIPSIS
        1 activations are ReLU now (forced: gates were soft)
        ...
    """
    check_options(calibration, compensate)
    wanted = check_hinges(hinges, budget, compensate is not None)
    place, source = usable_device(device), Source(src, dst, overwrite, trust_remote_code=trust_remote_code)
    if calibration is not None or wanted is not None:
        streamed = Streamed(source, place)
        asked = Asked(force, tolerance, targets, compensate, compute_metrics, hinges, budget)
        with refit_streamed(streamed, calibration, asked) as report:
            return _write_relu(source, streamed.model, report, details, link, overwrite, streamed)
    model = source.load()
    dropped = _load_hardness(model, source.shards)
    report = relu_ize(model, force, tolerance=tolerance, targets=targets)
    return _write_relu(source, model, report, details, link, overwrite, dropped=dropped)


def _write_relu(
    source: Source,
    model: PreTrainedModel,
    report: SubstitutionReport,
    details: CardDetails | None,
    link: bool,
    overwrite: bool,
    streamed: Streamed | None = None,
    dropped: Collection[str] = (),
) -> CheckpointReport:
    """The folder of the ReLU model."""
    left_out = set(CARD_FILES)
    with whole_folder(source.target, overwrite) as temporary:
        added, replaced = {}, {}
        if streamed is not None:
            added, replaced, dropped = streamed.added(), streamed.changed(), streamed.hardness
        added = save_parts(model, temporary, added)
        links = source.carry_along(temporary, left_out, link)
        write_card(model, temporary, source.target.name, report, details or CardDetails())
        written = source.finish(temporary, model, links, added=added, dropped=dropped, replaced=replaced, link=link)
        if streamed is not None:
            streamed.check_unchanged()
    return _report(source, report, written)


def _report(source: Source, model: ConversionReport | SubstitutionReport, written: WrittenFiles) -> CheckpointReport:
    return CheckpointReport(
        source.target,
        model,
        linked=written.linked,
        copied=written.copied,
        rewritten=written.rewritten,
        bytes_written=written.bytes_written,
    )


def _hardness(model: PreTrainedModel) -> dict[str, Tensor]:
    """The λ of the model's state dict, under all names of a site that is shared."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == NAME}


def _load_hardness(model: PreTrainedModel, shards: list[Shard]) -> frozenset[str]:
    """Gives the sites the checkpoint's λ, or 1 where it has none, as from_pretrained does; the names of its tensors."""
    places = {name: shard.path for shard in shards for name in shard.tensors if name.rpartition(".")[2] in (NAME, OLDER)}
    stored = {name.replace(OLDER, NAME): name for name in places}
    sites = list(_hardness(model))
    with scratch_folder() as scratch:  # numbers in the place of λ show what each is called in a checkpoint
        numbers = save_parts(
            model, scratch, {name: torch.full((1,), float(i), device="cpu") for i, name in enumerate(sites)}
        )
    called = {name: sites[int(number)] for name, number in numbers.items()}
    lost, without = sorted(set(stored) - set(called)), sorted(set(called) - set(stored))
    if lost and without:
        raise CheckpointError(
            f"the checkpoint holds {lost[0]}, of which {type(model).__name__} knows nothing, and lacks {without[0]}: was it "
            "saved by another class than config.json names?"
        )
    for site in hardness_sites(model).values():
        site.to_empty(device="cpu").reset_parameters()
    for name in sorted(set(called) & set(stored)):
        with safe_open(places[stored[name]], framework="pt") as file:
            leaf = stored[name].rpartition(".")[2]
            model.get_submodule(called[name].rpartition(".")[0]).load_state_dict({leaf: file.get_tensor(stored[name])})
    return frozenset(places)
