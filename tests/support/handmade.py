"""Models made by hand, whose structure no architecture of transformers has: one map after a site, stacks of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from support.models import randomized

Made = dict[str, Any]
Forward = Callable[["Handmade", Tensor], Tensor]


def _channels_first(model: Handmade, h: Tensor) -> Tensor:
    return model.second(h.movedim(-1, 1)).movedim(1, -1)


def _normed(model: Handmade, h: Tensor) -> Tensor:
    return model.norm(model.second(h.movedim(-1, 1))).movedim(1, -1)


def _in_place(model: Handmade, h: Tensor) -> Tensor:
    h.mul_(2.0)
    return model.second(h.relu_()).add_(1.0)


# kind → how the second map is made, and how it is applied to the activation's output
KINDS: dict[str, tuple[Callable[[], Made], Forward]] = {
    "linear": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: m.second(h)),
    "1 × 1": (lambda: {"second": nn.Conv2d(8, 8, 1)}, _channels_first),
    "3 × 3": (lambda: {"second": nn.Conv2d(8, 8, 3, padding=1)}, _channels_first),
    "groups": (lambda: {"second": nn.Conv2d(8, 8, 1, groups=2)}, _channels_first),
    "depthwise": (lambda: {"second": nn.Conv2d(8, 8, 3, 2, padding=1, groups=8)}, _channels_first),
    "dilated": (lambda: {"second": nn.Conv2d(8, 6, (3, 2), padding="same", dilation=(1, 2), groups=2)}, _channels_first),
    "norm": (lambda: {"second": nn.Conv2d(8, 8, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(8)}, _normed),
    "norm beside": (
        lambda: {"second": nn.Conv2d(8, 8, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(8)},
        lambda m, h: (y := m.second(h.movedim(-1, 1))).movedim(1, -1) + m.norm(y).movedim(1, -1),
    ),
    "norm without numbers": (
        lambda: {"second": nn.Conv2d(8, 8, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(8, affine=False)},
        _normed,
    ),
    "stride": (lambda: {"second": nn.Conv2d(8, 8, 1, stride=2)}, _channels_first),
    "two": (lambda: {"second": nn.Linear(8, 8), "third": nn.Linear(8, 8)}, lambda m, h: m.second(h) + m.third(h)),
    "the same twice": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: m.second(h) + m.second(2 * h)),
    "transposed": (lambda: {"weight": nn.Parameter(torch.randn(8, 8))}, lambda m, h: F.linear(h, m.weight.T)),
    "computed": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: F.linear(h, m.second.weight.softmax(0))),
    "computed bias": (lambda: {"second": nn.Linear(8, 8)}, lambda m, h: F.linear(h, m.second.weight, 2 * m.second.bias)),
    "none": (lambda: {}, lambda m, h: h.square()),
    "in place": (lambda: {"second": nn.Linear(8, 8)}, _in_place),
    "through a slice": (lambda: {"second": nn.Linear(8, 4)}, lambda m, h: m.second(torch.cat([h[:, 1:], h[:, :1]], 1))),
    "shared": (
        lambda: {"second": nn.Linear(8, 8), "other": nn.Linear(8, 8), "act2": True},
        lambda m, h: m.second(h) + m.second(m.act2(m.other(h.detach()))),
    ),
    "idle": (lambda: {"second": nn.Linear(8, 8), "act2": True}, lambda m, h: m.second(h)),
    "copied": (  # a map that is no F.linear, then one that is
        lambda: {"weight": nn.Parameter(torch.randn(8, 8)), "second": nn.Linear(8, 8)},
        lambda m, h: m.second(torch.tanh(h @ m.weight)),
    ),
}


class HandmadeConfig(PreTrainedConfig):
    model_type = "handmade"

    def __init__(self, kind: str = "linear", hidden_act: str = "gelu", **kwargs: Any) -> None:
        self.kind, self.hidden_act = kind, hidden_act
        super().__init__(**kwargs)


class Handmade(PreTrainedModel):
    """A linear map, an activation, and a second map as the kind says."""

    config_class = HandmadeConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config: HandmadeConfig) -> None:
        super().__init__(config)
        self.first, self.act = nn.Linear(8, 8), ACT2FN[config.hidden_act]
        for name, part in KINDS[config.kind][0]().items():
            setattr(self, name, ACT2FN[config.hidden_act] if part is True else part)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return {"logits": KINDS[self.config.kind][1](self, self.act(self.first(inputs_embeds)))}


class Block(nn.Module):
    """A residual block: "pre" and "post" norm, "wiped" is "post" and overwrites the sum once the norm has it, "gated" by a
    factor that differs from row to row, "plain" without a site.
    """

    def __init__(self, kind: str, act: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.Tanh() if kind == "plain" else ACT2FN[act]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.second(self.act(self.first(x if self.kind in ("post", "wiped") else self.norm(x))))
        if other is not None:
            y = y + other
        if self.kind in ("post", "wiped"):
            total = x + y
            x = self.norm(total)
            if self.kind == "wiped":
                total.zero_()
            return x
        return x + y * torch.sigmoid(x.sum(-1, keepdim=True)) if self.kind == "gated" else x + y


class StackConfig(PreTrainedConfig):
    model_type = "handmade_stack"

    def __init__(self, front: Any = (), back: Any = (), way: str = "", hidden_act: str = "gelu", **kwargs: Any) -> None:
        self.front, self.back, self.way, self.hidden_act = list(front), list(back), way, hidden_act
        super().__init__(**kwargs)


class Stack(PreTrainedModel):
    """Two stacks of blocks. The last of the back runs only where the input is small, so that it may skip a batch.

    Ways of the front: "dependent" gives each block a second argument made from the hidden state, "flipped" turns the hidden
    state round after each block, "reversed" begins with the last.
    """

    config_class = StackConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.front = nn.ModuleList(Block(kind, config.hidden_act) for kind in config.front)
        self.back = nn.ModuleList(Block(kind, config.hidden_act) for kind in config.back)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        x = inputs_embeds
        for block in reversed(self.front) if self.config.way == "reversed" else self.front:
            x = block(x, x.mean(-1, keepdim=True).square()) if self.config.way == "dependent" else block(x)
            x = x.flip(1) if self.config.way == "flipped" else x
        x = x.flip(1)
        for block in self.back:
            if block is not self.back[-1] or float(inputs_embeds.abs().max()) < 100.0:
                x = block(x)
        return {"logits": x}


def handmade(kind: str) -> PreTrainedModel:
    """A model with one map after its site, converted."""
    return randomized(Handmade(HandmadeConfig(kind)))


def stack(*front: str, back: tuple[str, ...] = (), way: str = "") -> PreTrainedModel:
    """Two stacks of blocks, converted."""
    return randomized(Stack(StackConfig(front, back, way)))


def embeds(seed: int = 0, shape: tuple[int, ...] = (2, 4, 4, 8)) -> dict[str, Tensor]:
    """A batch for the models made by hand."""
    return {"inputs_embeds": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}
