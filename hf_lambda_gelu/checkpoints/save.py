"""Saves a ReLU-ized model as a folder that stock transformers loads, with its model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..activation.module import hardness_sites
from ..measurement.plots import plot_hardness
from ..structure.adapters import adapted_layer, has_adapters, how_to_merge
from ..structure.config import LAMBDA_KEYS, activation_attributes
from ..structure.config_probe import governed_modules, other_activations
from ..structure.modules import wrapped_part
from ..structure.offloading import check_not_offloaded
from ..structure.other_runtimes import runtime_warnings
from ..structure.quantised import changed_by_saving, is_packed, quantised_unsaid
from ..structure.sharding import check_whole
from ..structure.smooth_activations import smooth_activations, smooth_modules
from ..structure.transaction import transaction
from ..surgery.report import SubstitutionReport
from .as_saved import check_as_saved
from .card import PLOT_NAME, CardDetails, card_record, package_versions, render_card, write_record
from .carried_code import check_code_may_go, loading_lines, settle_code
from .compression import compression, pruned_maps
from .folders import check_new, whole_folder

_FROM_PARTS = (
    "bring them together by torch's get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), or your "
    "engine's own way, on every process; load them on one into a model that type(…)(model.config) makes, and save that"
)
_RELUS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU)


@transaction
def save_relu_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processor: Any = None,
    details: CardDetails | None = None,
    model_name: str | None = None,
    learned: dict[str, float] | None = None,
    history: list[dict[str, Any]] | None = None,
    report: SubstitutionReport | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Writes weights (safetensors), a stock config, the processor, a model card and the λ profile; whole or not at all.

    Args:
        model: a model after `relu_ize`, in any floating point dtype; or one that was saved, loaded and compressed by
            llm-compressor, as the card then says.
        folder: the folder to make. An existing one that is not empty is refused unless `overwrite`, which replaces it.
        processor: tokenizer, image processor or feature extractor to save beside the weights; a list for several.
        details: what the card should say, see `CardDetails`.
        model_name: the name in the card, e.g. the Hub id; by default the folder's.
        learned: λ per site as learned (`trainer.learned_hardness`): plotted and kept in `lambda_gelu.json`.
        history: `trainer.state.log_history`, for the plot of λ over training.
        report: what `relu_ize` returned; by default what it left on the model. Merged adapters make another, without one.
        trust_remote_code: write also the code of its own that model, tokenizer or processor has; else that is refused.

    Returns:
        The folder.

    Raises:
        ValueError: smooth gates in model or config, adapters that are not merged, tensors that are not finite, offloaded or
            sharded weights, an existing or unwritable folder, a model from compressed weights or that stock transformers
            would build otherwise (another head, weight norm), code that is not trusted. Nothing is written.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1))
        >>> _, report = hlg.convert(model), hlg.relu_ize(model, force=True)
        >>> folder = hlg.save_relu_pretrained(model, "runs/saved-relu", report=report)
        >>> model = BertForSequenceClassification.from_pretrained(folder)
    """
    folder = Path(os.path.abspath(folder))
    check_relu(model)
    _check_not_loaded_compressed(model)
    processors = processor if isinstance(processor, (list, tuple)) else [processor]
    check_code_may_go([model, model.config, *processors], trust_remote_code)
    check_new(folder, overwrite)
    report = report or report_left_on(model)
    if report is None and (smooth := smooth_modules(model)):
        raise ValueError(f"the model did not come from relu_ize and has smooth modules, from {smooth[0]} on")
    pruned = pruned_maps(model)
    with whole_folder(folder, overwrite) as temporary:
        model.save_pretrained(temporary)
        check_as_saved(model, temporary)
        _save_processors(processors, temporary)
        settle_code(temporary, trust_remote_code)
        write_card(model, temporary, model_name or folder.name, report, details or CardDetails(), learned, history, pruned)
    return folder


def _save_processors(processors: Sequence[Any], folder: Path) -> None:
    for item in processors:
        if item is not None:
            item.save_pretrained(folder)


def _check_not_loaded_compressed(model: PreTrainedModel) -> None:
    """ValueError for a model of a folder with compressed weights, which transformers unpacks when it first runs: what is
    saved of it then is neither."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(method, "quant_method", None) == "compressed-tensors":
        raise ValueError(
            f"{type(model).__name__} was loaded from compressed weights, and would be saved with unpacked ones that its "
            "config does not describe: publish the folder that it came from, push_relu_to_hub(folder, …). To have a card, "
            "call save_relu_pretrained on the model that llm-compressor returns"
        )


def report_left_on(model: nn.Module) -> SubstitutionReport | None:
    """The report that `relu_ize` left on the model itself; None where the model did not come from it."""
    return getattr(model, "_relu_report", None)


def write_card(
    model: PreTrainedModel,
    folder: Path,
    name: str,
    report: SubstitutionReport | None,
    details: CardDetails,
    learned: dict[str, float] | None = None,
    history: list[dict[str, Any]] | None = None,
    pruned: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model card and what it is made from: the λ profile, and its plot where matplotlib is there."""
    profile = learned or (report.profile if report else None)
    plot = PLOT_NAME if profile and _plotted(profile, folder / PLOT_NAME, history or [], bool(learned)) else None
    record = card_record(
        name,
        type(model).__name__,
        details,
        report,
        smooth_activations(model),
        pipeline_tag(model),
        package_versions(),
        learned,
        plot,
        compression(folder, pruned),
        runtime_warnings(model),
        loading_lines(folder, type(model).__name__),
        getattr(model, "_llama_of", None),
    )
    write_record(folder, record)
    render_card(record).save(folder / "README.md")


def check_relu(model: PreTrainedModel) -> None:
    """Raises ValueError unless the gates of `model` that its config governs are ReLU, and every tensor is finite."""
    if has_adapters(model):
        layer = adapted_layer(model)
        raise ValueError(
            f"{type(model).__name__} has adapters or prompts{f' ({layer})' if layer else ''}, without which stock "
            f"transformers would load it: {how_to_merge(model)}"
        )
    if not isinstance(model, PreTrainedModel):
        inside = wrapped_part(model)
        way = (
            "save its weights by safetensors.torch.save_model" if inside is None else f"pass model.get_submodule({inside!r})"
        )
        raise ValueError(f"expected a transformers model, which a config can rebuild, got {type(model).__name__}: {way}")
    check_whole(model, "saving", _FROM_PARTS)
    check_not_offloaded(model)
    left = hardness_sites(model)
    if left:
        raise ValueError(
            f"the model still has {len(left)} λ-GELU modules, from {next(iter(left))} on: call relu_ize(model) first"
        )
    keys = [f"config.{path} = {value!r}" for path, value in activation_attributes(model.config) if value in LAMBDA_KEYS]
    if keys:
        raise ValueError(f"{', '.join(keys)}: stock transformers does not know this key. Call relu_ize(model) first")
    smooth = [a for a in governed_modules(model) if a.modules]
    if smooth:
        named = ", ".join(f"config.{a.path} = {a.value!r}" for a in smooth)
        relus = (name for a in smooth for name in a.modules if isinstance(model.get_submodule(name), _RELUS))
        if found := next(relus, None):
            raise ValueError(
                f"{named}, and {found} is ReLU: a part of the model was converted by itself, of which the config of the "
                "whole does not know. Set 'relu' there in its config, and save it then"
            )
        if report_left_on(model) is None:
            raise ValueError(f"{named}: the model is smooth. Call convert(model), train, and relu_ize(model) first")
        raise ValueError(
            f"{named}: relu_ize has left {sum(len(a.modules) for a in smooth)} smooth activations, {smooth[0].modules[0]} "
            "the first of them, and its report says why. A model that is ReLU in part is saved by model.save_pretrained"
        )
    other = other_activations(model)
    if other and not any(isinstance(module, _RELUS) for module in model.modules()):
        raise ValueError(
            f"{', '.join(f'config.{a.path} = {a.value!r}' for a in other)}: no activation of the model is ReLU, so it is no "
            "ReLU network. λ-GELU leads from GELU and SiLU to ReLU alone"
        )
    _check_quantised(model)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    broken = [name for name, tensor in model.state_dict().items() if _diverged(name, tensor, name in buffers)]
    if broken:
        raise ValueError(f"{len(broken)} tensors hold NaN or infinity, e.g. {broken[0]}: the training diverged; not saved")


def _check_quantised(model: PreTrainedModel) -> None:
    """ValueError where the folder would hold other numbers than the model's quantised weights stand for."""
    unsaid, changed = quantised_unsaid(model), changed_by_saving(model)
    if unsaid is not None:
        raise ValueError(
            f"{unsaid} is quantised, and no quantization_config of the config lets stock transformers make it so: save "
            "the ReLU model before it is quantised, and quantise what is loaded"
        )
    if changed is not None:
        raise ValueError(
            f"{changed} holds 4 bits of bitsandbytes on a CPU, where saving writes other scales than the model computes "
            "with: save the ReLU model before it is quantised, and quantise what is loaded; or save it on a GPU"
        )


def _diverged(name: str, tensor: Tensor, buffer: bool) -> bool:
    """Whether a tensor of the state dict holds NaN, or infinity where no architecture puts it on purpose: as the bound of a
    clipping or in a mask, which are buffers."""
    if not tensor.is_floating_point() or is_packed(tensor):
        return False
    bound = buffer and not name.rpartition(".")[2].startswith("running_")
    return bool((torch.isnan(tensor) if bound else ~torch.isfinite(tensor)).any())


def pipeline_tag(model: PreTrainedModel) -> str | None:
    """The Hub's task name for the model's class, as transformers' own pipelines know it; None where they do not."""
    from transformers.modelcard import TASK_MAPPING
    from transformers.pipelines import PIPELINE_REGISTRY  # here, as it imports half of transformers

    name = type(model).__name__
    mappings = cast("Mapping[str, Mapping[str, str | tuple[str, ...]]]", TASK_MAPPING)
    for task, mapping in mappings.items():
        classes = [c for entry in mapping.values() for c in (entry if isinstance(entry, (list, tuple)) else [entry])]
        if name in classes and task in PIPELINE_REGISTRY.get_supported_tasks():
            return task
    return None


def _plotted(profile: dict[str, float], path: Path, history: list[dict[str, Any]], learned: bool) -> bool:
    try:
        plot_hardness(profile, path, history, "Learned hardness" if learned else "Hardness before substitution")
    except ImportError:  # matplotlib is an extra
        return False
    return True
