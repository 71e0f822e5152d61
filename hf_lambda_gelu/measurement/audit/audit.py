"""Tells which activations a model really runs, by watching the operations of a forward pass.

Class and attribute names say what the author meant. Here only torch's operations count, and a GELU that is written as a
formula is known by its numbers: of x · gate, the argument of the erf, tanh or sigmoid is compared with x.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import LinearActivation

from ..._compat import is_compiled
from ...reports import to_dict
from ...structure.loading import CheckpointError, load_saved
from ...structure.modelling_code import calls_in_class
from ...structure.modules import is_activation, probed_base
from ...structure.offloading import check_not_offloaded
from ...structure.transaction import transaction
from ..batches import FORWARD_ERRORS
from ..examples.choice import example_inputs
from ..forward import measuring, random_state_kept
from .kinds import Group, group_of
from .operations import Event, OperationTrace

_NO_ACTIVATION = (nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax, LinearActivation)


@dataclass(frozen=True)
class AuditEntry:
    """What one module ran, its children apart.

    Attributes:
        name: of the innermost module that was running, "" for the model itself.
        kind: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "lambda_gelu", "tanh", "sigmoid gate" …
        calls: how many times in the pass.
        hardness: λ of a λ-GELU, and of a formula such as x · sigmoid(kx).
        base: of a λ-GELU.
        zeros: fraction of the output that is 0, of the kinds that make zeros.
    """

    name: str
    kind: str
    calls: int
    hardness: float | None = None
    base: str | None = None
    zeros: float | None = None

    @property
    def group(self) -> Group:
        """ "piecewise": piecewise linear; "other": bounded or a gate; "smooth": all else, ReLU² and hardswish too."""
        return group_of(self.kind)


@dataclass(frozen=True)
class AuditReport:
    """What `audit` saw. Printing it gives the table; `to_dict` what a JSON file can hold.

    Attributes:
        model: name of the model's class.
        entries: in the order of their first call.
        unreached: (module name, what) of activations that the pass did not come to, so that it says nothing about them.
        opaque: operations that are not torch's own: what they do inside is not seen.

    Examples:
        >>> report = hlg.audit("runs/bert-relu")  # import hf_lambda_gelu as hlg
        >>> report.is_relu, report.counts
    """

    model: str
    entries: tuple[AuditEntry, ...]
    unreached: tuple[tuple[str, str], ...] = ()
    opaque: tuple[str, ...] = ()

    @property
    def smooth(self) -> list[AuditEntry]:
        """The entries that are not piecewise linear, bounded ones and gates apart."""
        return [entry for entry in self.entries if entry.group == "smooth"]

    @property
    def counts(self) -> dict[str, int]:
        """{kind: number of modules}."""
        return dict(Counter(entry.kind for entry in self.entries))

    @property
    def is_relu(self) -> bool:
        """Nothing smooth ran, and at least one ReLU did. See `unreached` for what did not run."""
        return not self.smooth and "relu" in self.counts

    def to_dict(self) -> dict[str, Any]:
        """The attributes, each entry with its group, and `counts` and `is_relu`."""
        entries = [to_dict(entry) | {"group": entry.group} for entry in self.entries]
        return to_dict(self) | {"entries": entries, "counts": self.counts, "is_relu": self.is_relu}

    def __str__(self) -> str:
        rows: dict[tuple[str, str, str], list[AuditEntry]] = {}
        for entry in self.entries:  # the layers of a network in one row
            label = entry.kind if entry.base is None else f"{entry.kind} ({entry.base})"
            rows.setdefault((label, entry.group, _pattern(entry.name)), []).append(entry)
        smooth = len(self.smooth)
        verdict = "a ReLU network" if self.is_relu else f"{smooth} smooth" if smooth else "no ReLU, nothing smooth"
        lines = [f"{self.model} runs {len(self.entries)} activations: {verdict}"]
        width = max((len(label) for label, _, _ in rows), default=0)
        for (label, group, pattern), entries in rows.items():
            text = f"  {label:<{width}}  {group:<9}  {len(entries):>3} × {pattern}, {sum(e.calls for e in entries)} calls"
            for name, form in (("hardness", "λ {}"), ("zeros", "{} zeros")):
                values = [value for e in entries if (value := getattr(e, name)) is not None]
                if values:
                    shown = [f"{v:.0%}" if name == "zeros" else f"{v:.4g}" for v in (min(values), max(values))]
                    text += ", " + form.format(" to ".join(dict.fromkeys(shown)))
            lines.append(text)
        if self.unreached:
            lines.append(f"{len(self.unreached)} not reached by this pass, which says nothing about them")
            missed = Counter((_pattern(name), what) for name, what in self.unreached)
            lines += [f"  {count:>3} × {pattern}: {what}" for (pattern, what), count in missed.items()]
        if self.opaque:
            lines.append(f"not seen into: {', '.join(self.opaque)}")
        return "\n".join(lines)


@transaction
def audit(
    model_or_path: nn.Module | str | os.PathLike[str], inputs: Any = None, *, trust_remote_code: bool = False
) -> AuditReport:
    """Runs the model once and tells which activations ran, whatever the modules and the config are called.

    Softmax, normalisation and rotary embeddings are no activations; neither is a function of parameters alone. What is seen
    are torch's operations: kernels that go past them (a compiled extension) are not.

    Args:
        model_or_path: any module, or the folder of a checkpoint, loaded on the CPU by the class in its config. Run in
            eval mode without gradients; modes, hooks and random state are afterwards as they were.
        inputs: a mapping of forward's arguments, or a tensor or tuple for positional ones; for a transformers model by
            default a small batch made to fit it. Only what they reach is audited: see `unreached`.
        trust_remote_code: run code of its own that the folder has; without it such a folder is refused, and nothing of it
            runs.

    Raises:
        TypeError: neither a module nor a path; inputs of another type.
        ValueError: a folder without a model, or with code that is not trusted (a CheckpointError); a model on meta or
            compiled, no inputs and none to be guessed, or a forward that raises.

    Examples:
        >>> import hf_lambda_gelu as hlg
        >>> from transformers import BertConfig, BertModel
        >>> print(hlg.audit(BertModel(BertConfig(num_hidden_layers=2))))
    """
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
    elif isinstance(model_or_path, (str, os.PathLike)):
        with random_state_kept(None):
            model = _load(model_or_path, trust_remote_code)
    else:
        raise TypeError(f"audit expects a module or the folder of a checkpoint, got {type(model_or_path).__name__}")
    _check_runnable(model)
    args, kwargs = _arguments(model, inputs)
    trace = OperationTrace(model)
    with random_state_kept(model), measuring(model), torch.no_grad():
        try:
            with trace.watching(model), trace:
                model(*args, **kwargs)
        except FORWARD_ERRORS as error:
            raise ValueError(
                f"{type(model).__name__}.forward raised {type(error).__name__}: {error}. Pass inputs=… that it takes"
            ) from error
        unreached = tuple(_unreached(model, trace.reached))
    return AuditReport(type(model).__name__, tuple(_entries(trace.events)), unreached, tuple(trace.opaque))


def _entries(events: list[Event]) -> Iterator[AuditEntry]:
    groups: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        if event.kind:
            groups.setdefault((event.name, event.kind), []).append(event)
    for (name, kind), events in groups.items():
        size = sum(event.size for event in events)
        zeros = sum(event.zeros or 0 for event in events) / size if size else None
        yield AuditEntry(name, kind, len(events), events[0].hardness, events[0].base, zeros)


def _load(folder: str | os.PathLike[str], trust_remote_code: bool) -> PreTrainedModel:
    try:
        return load_saved(folder, otherwise=cast("type[PreTrainedModel]", AutoModel), trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"no model could be loaded from {os.fspath(folder)!r}: {error}") from error


def _check_runnable(model: nn.Module) -> None:
    check_not_offloaded(model)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model is on the meta device, where nothing can be computed: load its weights first")
    if any(is_compiled(m) for m in model.modules()):
        raise ValueError("the model is compiled, which hides its operations: pass the one before torch.compile (._orig_mod)")


def _arguments(model: nn.Module, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments for forward, on the model's device; copies, as a model may write into its input."""
    if inputs is None and isinstance(model, PreTrainedModel):
        inputs = example_inputs(model)
    if inputs is None:
        raise ValueError(f"{type(model).__name__} is no transformers model: pass inputs=…, what its forward takes")
    tensor = next(model.parameters(), next(model.buffers(), None))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().to(value.device if tensor is None else tensor.device)

    if isinstance(inputs, Mapping):
        return [], {name: placed(value) for name, value in inputs.items()}
    if isinstance(inputs, (Tensor, tuple, list)):
        return [placed(value) for value in ([inputs] if isinstance(inputs, Tensor) else inputs)], {}
    raise TypeError(f"inputs is a {type(inputs).__name__}: expected a mapping of forward's arguments, a tensor or a tuple")


def _unreached(model: nn.Module, reached: set[nn.Module]) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if module in reached or isinstance(module, _NO_ACTIVATION):
            continue
        if is_activation(module) or probed_base(module) is not None:
            yield name, type(module).__name__
        else:  # an expert whose forward calls F.gelu
            cls: type = type(module)
            yield from ((name, call) for call in calls_in_class(cls))


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name) or "the model itself"
