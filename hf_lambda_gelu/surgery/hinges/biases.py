"""Whether gates have the biases that their ReLUs bend by, or can get them from the config; and which one cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from ...structure.config_probe import bias_attributes
from ...structure.linear_maps import LinearMap


def unbiased(model: nn.Module, gates: Mapping[str, LinearMap]) -> str | None:
    """Which gate's map will never have a bias, in words; None if each has one, or a config attribute gives it one.

    Args:
        gates: site → the map before it.
    """
    lacking = {site: _name(gate) for site, gate in gates.items() if gate.bias is None}
    if not lacking or _given(model, set(lacking.values())):
        return None
    alike: dict[str, list[str]] = {}  # sites of layers that differ in their number alone: one of them is asked for
    for site, name in lacking.items():
        alike.setdefault(re.sub(r"\d+", "#", name), []).append(site)
    first = [sites[0] for sites in alike.values()]
    site = next((site for site in first if not _given(model, {lacking[site]})), first[0])
    return (
        f"{site}: {gates[site].name} has no bias, and no config attribute gives it one, so that its ReLUs cannot bend at "
        "other places than 0. Llama and Granite have such a switch (mlp_bias); T5, Mistral, Qwen and Gemma have "
        "none. Mistral's and Qwen2's weights can be a Llama's: hlg.as_llama(model), or --as-llama. Else use hinges=1"
    )


def _given(model: nn.Module, names: set[str]) -> bool:
    return isinstance(model, PreTrainedModel) and bias_attributes(model, names) is not None


def _name(gate: LinearMap) -> str:
    return gate.name.removesuffix("weight") + "bias"
