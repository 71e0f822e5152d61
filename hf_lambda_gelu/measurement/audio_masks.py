"""Masks of audio: a convolutional front end turns samples, or mel frames, into fewer frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def frame_mask(model: nn.Module, mask: Tensor, frames: int) -> Tensor | None:
    """The mask (batch, samples) as one of so many frames; None if no part of the model's front end makes that many.

    A frame counts as padding unless all samples that it is made of are none, as transformers counts them. [derived]
    """
    lengths = mask.sum(-1)
    whole = torch.full_like(lengths[:1], mask.shape[-1])
    for convolved in _front_ends(model):
        if int(_last(convolved(whole))) == frames:
            kept = _last(convolved(lengths)).clamp(0, frames)
            return torch.arange(frames, device=mask.device) < kept[:, None]
    return None


def _last(lengths: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The lengths after the last of several stages (Qwen2-Audio's convolution and pooling)."""
    return lengths[-1] if isinstance(lengths, tuple) else lengths


class _Convolutions:
    """How many frames so many samples give."""

    def __init__(self, kernels: Sequence[int], strides: Sequence[int]) -> None:
        self.layers = list(zip(kernels, strides, strict=True))

    def __call__(self, lengths: Tensor) -> Tensor:
        for kernel, stride in self.layers:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return lengths


def _front_ends(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor | tuple[Tensor, ...]]]:
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        kernels, strides = (getattr(part.config, name, None) for name in ("conv_kernel", "conv_stride"))
        if isinstance(kernels, (list, tuple)) and isinstance(strides, (list, tuple)) and len(kernels) == len(strides):
            for count in range(len(kernels), 0, -1):
                yield _Convolutions(kernels[:count], strides[:count])
        lengths = getattr(part, "_get_feat_extract_output_lengths", None)
        if lengths is not None:
            yield lengths
