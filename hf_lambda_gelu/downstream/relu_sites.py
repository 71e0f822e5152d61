"""The ReLU sites of a model: the modules that `relu_ize` leaves in the place of λ-GELUs, also after a reload."""

from __future__ import annotations

from torch import nn

from ..activation.module import hardness_sites
from ..structure.modules import named_modules
from ..structure.offloading import check_not_offloaded
from ..structure.smooth_activations import smooth_activations


def relu_sites(model: nn.Module) -> dict[str, nn.ReLU]:
    """{module name: ReLU} in network order, a shared one under its first name.

    Functional calls (`F.relu`) are no modules, and not among them.

    Raises:
        ValueError: the model is still smooth, has no ReLU, or its weights are elsewhere; the message says what to do.
    """
    check_not_offloaded(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where nothing can be measured: load its weights first")
    kind, soft = type(model).__name__, hardness_sites(model)
    if soft:
        raise ValueError(
            f"{kind} has {len(soft)} λ-GELUs ({next(iter(soft))} the first), which are smooth and put out no exact zeros: "
            "call hf_lambda_gelu.relu_ize(model, …) first"
        )
    found: dict[nn.Module, str] = {}
    for name, module in named_modules(model):
        if isinstance(module, nn.ReLU):
            found.setdefault(module, name)
    if not found:
        smooth = smooth_activations(model)
        if smooth:
            raise ValueError(
                f"{kind} is smooth ({smooth[0].name}: {smooth[0].what}): call hf_lambda_gelu.convert(model), and then "
                "hf_lambda_gelu.relu_ize(model, …)"
            )
        raise ValueError(
            f"{kind} has no torch.nn.ReLU module. A ReLU that is a function (F.relu) cannot be watched: make it a module"
        )
    return {name: module for module, name in found.items() if isinstance(module, nn.ReLU)}
