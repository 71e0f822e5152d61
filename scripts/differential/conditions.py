"""The conditions under which a refit is asked for: how the model is built and called, and which tokens are padding."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lambda_gelu.measurement.examples.config_search import special_tokens
from scripts.architectures.tiny_models import example_inputs, model_class, tiny_config, tiny_model

CONDITIONS = ("padded", "labels", "packed", "autocast", "wrapped", "cached", "chunked", "compiled", "offloaded")
SIZES = (5, 3, 7)  # examples by batch: no width of a window, no number of heads
# a few default configurations have ReLU where what people use has not
ACTIVATIONS = {"t5": {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}}

_WHOLE = {"longformer": "attention_window", "led": "attention_window", "pegasus_x": "block_size"}


class Inapplicable(Exception):
    """The condition makes no sense for the model; says why."""


@dataclass
class Batch:
    """One batch, and what was put into it.

    Attributes:
        inputs: what the model is called with.
        size: how many examples.
        tokens: (size, length), True at tokens of the text, or of the encoder's input; None where all are.
        decoder: the same of the decoder's input.
        media: (…, length), the same of what an encoder of sounds or images works on.
    """

    inputs: dict[str, Any]
    size: int
    tokens: Tensor | None = None
    decoder: Tensor | None = None
    media: Tensor | None = None


@dataclass
class Case:
    """A model under a condition.

    Attributes:
        model: what is converted and handed to `relu_ize`, once `wrap` has been called on it.
        wrap: the model as the condition has it; in place where it can.
        context: what `relu_ize` is called in.
        chunked: whether a map sees a sequence in pieces.
        exact: whether all is computed in fp32, so that float64 can decide where rounding is blown up.
        own_wrap: whether the reference runs the wrapped model too.
    """

    model: nn.Module
    batches: list[Batch]
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    chunked: bool = False
    exact: bool = True
    own_wrap: bool = True


def without_padding(case: Case) -> None:
    """Let all tokens count, where it cannot be told from outside which rows are of padding."""
    for batch in case.batches:
        if batch.tokens is not None:
            length = batch.inputs["attention_mask"].shape[1]
            batch.inputs["attention_mask"] = torch.ones_like(batch.inputs["attention_mask"])
            batch.tokens = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens) < length


def tell_media(case: Case) -> None:
    """Say which rows of sounds, key points and regions are padding, as the model has it; call this once all is cast."""
    model = case.model
    model_type = "" if isinstance(model, Wrapper) else model.config.model_type
    for batch in case.batches:
        mask = batch.inputs.get("input_features_mask")
        if isinstance(mask, Tensor) and model_type.startswith("audioflamingo3"):  # a convolution of stride 2
            frames = (batch.inputs["input_features"].shape[-1] - 1) // 2 + 1
            batch.media = torch.arange(frames) < (mask.sum(-1, keepdim=True) - 1) // 2 + 1
        if model_type == "lightglue":
            with case.context(), torch.no_grad():
                found = model.keypoint_detector(batch.inputs["pixel_values"].flatten(0, 1)).mask
            batch.media = found.bool()
    if model_type == "pp_doclayout_v2":
        model.reading_order.register_forward_pre_hook(partial(_tell_regions, case.batches), with_kwargs=True)


def _tell_regions(batches: list[Batch], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A start, the regions that the model is sure enough of in this run, an end; the rest is padding."""
    sure = kwargs["mask"]
    (batch,) = (batch for batch in batches if batch.size == len(sure))
    batch.media = torch.arange(sure.shape[1] + 2) < sure.sum(1, keepdim=True) + 2


def build(model_type: str, condition: str) -> Case:
    """The case; Inapplicable or CannotBuild where there is none."""
    if condition == "labels":
        return _with_labels(model_type)
    if condition == "cached":
        return _cached(model_type)
    if condition == "chunked":
        return _chunked(model_type)
    model = _model(model_type)
    if condition == "packed":
        return Case(model, _packed(model))
    batches = _batches(model)
    if condition == "padded":
        if all(batch.tokens is None for batch in batches):
            raise Inapplicable("it takes no text with a mask")
        return Case(model, batches)
    if condition == "autocast":
        return Case(model, batches, context=_autocast, exact=False)
    if condition == "wrapped":
        return Case(model, batches, wrap=_as_accelerate, exact=False)
    if condition == "compiled":
        return Case(model, batches, wrap=partial(torch.compile, backend="eager"), own_wrap=False)
    if condition == "offloaded":
        return Case(model, batches, wrap=_offloaded, own_wrap=False)
    raise ValueError(f"unknown condition {condition!r}: expected one of {', '.join(CONDITIONS)}")


# --------------------------------------------------------------------------------------------------------- the models


def _model(model_type: str, auto: str = "AutoModel", **changes: Any) -> PreTrainedModel:
    changes = {**ACTIVATIONS.get(model_type, {}), **changes}
    if not changes:
        return tiny_model(model_type, auto)
    kind = model_class(model_type, auto)
    if kind is None:
        raise Inapplicable(f"{auto} has no {model_type}")
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return kind(config).float().eval()


def _with_labels(model_type: str) -> Case:
    """An encoder-decoder model that makes its decoder's input from labels, some of them −100."""
    for auto in ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"):
        if model_class(model_type, auto) is not None:
            break
    else:
        raise Inapplicable("it makes no decoder input from labels")
    model = _model(model_type, auto)
    batches = _batches(model)
    for index, batch in enumerate(batches):
        batch.inputs.pop("decoder_input_ids", None)
        batch.inputs.pop("decoder_attention_mask", None)
        length = 9
        generator = torch.Generator().manual_seed(50 + index)
        labels = torch.randint(5, 90, (batch.size, length), generator=generator)
        lengths = torch.randint(2, length + 1, (batch.size,), generator=generator)
        batch.decoder = torch.arange(length) < lengths[:, None]
        batch.inputs["labels"] = labels.masked_fill(~batch.decoder, -100)
    return Case(model, batches)


class Wrapper(nn.Module):
    """A module around a causal LM, as training code has it: its forward has no `use_cache`."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(examples, positions, vocabulary), the logits."""
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


def _cached(model_type: str) -> Case:
    if model_class(model_type, "AutoModelForCausalLM") is None:
        raise Inapplicable("no causal LM")
    model = _model(model_type, "AutoModelForCausalLM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise Inapplicable("no causal LM")
    model.config.use_cache = True
    model.config.get_text_config().use_cache = True
    if hasattr(model.config, "is_decoder"):
        model.config.is_decoder = True
    batches = _batches(model)
    for batch in batches:
        batch.inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask") if name in batch.inputs}
        if "input_ids" not in batch.inputs:
            raise Inapplicable("it takes no text")
    return Case(Wrapper(model), batches)


def _chunked(model_type: str) -> Case:
    model = _model(model_type)
    parts = [part for part in model.modules() if getattr(part, "chunk_size_feed_forward", None) is not None]
    parts = [part for part in parts if isinstance(part.chunk_size_feed_forward, int)]
    if not parts:
        raise Inapplicable("it does not chunk its feed-forward")
    batches = _batches(model)
    text = "input_ids" in batches[0].inputs and "pixel_values" not in batches[0].inputs
    size = 2 if text and model_type != "xlnet" else 1  # XLNet has the examples where others have positions
    for part in model.modules():
        if hasattr(part, "chunk_size_feed_forward"):
            part.chunk_size_feed_forward = size
    model.config.chunk_size_feed_forward = size
    return Case(model, batches, chunked=True)


def _autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _as_accelerate(model: nn.Module) -> nn.Module:
    """As `Accelerator.prepare` does with mixed precision: forward within autocast, outputs in fp32."""
    from accelerate.utils import convert_outputs_to_fp32

    within = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = MethodType(convert_outputs_to_fp32(within), model)  # type: ignore[method-assign]
    model.forward.__func__.__signature__ = inspect.signature(type(model).forward)
    return model


def _offloaded(model: nn.Module) -> nn.Module:
    """The same weights on disk, fetched when a module runs; what cannot be offloaded is inapplicable."""
    from accelerate import disk_offload

    folder = tempfile.mkdtemp(prefix="offloaded-")
    try:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    except Exception as error:
        raise Inapplicable(f"accelerate cannot offload it: {error}") from error
    return model


# -------------------------------------------------------------------------------------------------------- the batches


def _batches(model: PreTrainedModel) -> list[Batch]:
    """Three batches of several sizes, with padding right in one and left in another where there is a text with a mask."""
    made = []
    for index, size in enumerate(SIZES):
        try:
            inputs = example_inputs(model, size)
        except Exception:
            inputs, size = example_inputs(model, 2), 2
        made.append(_varied(model, inputs, size, index))
    return made


def _varied(model: PreTrainedModel, inputs: dict[str, Any], size: int, seed: int) -> Batch:
    """Other numbers and tokens in each batch; special tokens, which stand for images and sounds, stay."""
    generator = torch.Generator().manual_seed(100 + seed)
    pad: int | None = None
    inputs = {name: copy.deepcopy(value) for name, value in inputs.items()}
    special = special_tokens(model.config)
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if name in ("input_ids", "decoder_input_ids") and not value.is_floating_point():
            plain = torch.tensor([token for token in range(2, int(value.max()) + 1) if token not in special] or [0])
            if name == "input_ids" and len(plain) > 1:  # padding has a token of its own, and no row that is a token's too
                pad, plain = int(plain[0]), plain[1:]
            other = plain[torch.randint(0, len(plain), value.shape, generator=generator)]
            # a decoder's input does not end: its last token would be taken for padding where both have one id
            stays = torch.isin(value, torch.tensor(sorted(special) or [-1])) & (name == "input_ids")
            inputs[name] = torch.where(stays, value, other)
        elif value.is_floating_point() and "mask" not in name and "points" not in name:
            inputs[name] = value + 0.3 * torch.randn(value.shape, generator=generator)
    tokens, decoder = _pad(inputs, size, left=seed == 1)
    if tokens is not None and pad is not None:
        special_here = torch.isin(inputs["input_ids"], torch.tensor(sorted(special) or [-1]))
        inputs["input_ids"] = torch.where(tokens | special_here, inputs["input_ids"], pad)
    if tokens is not None and model.config.model_type in _WHOLE:  # it pads to whole windows by itself
        window = getattr(model.config, _WHOLE[model.config.model_type])
        tokens = F.pad(tokens, (0, -tokens.shape[1] % (window if isinstance(window, int) else max(window))))
    return Batch(inputs, size, tokens, decoder)


def _pad(inputs: dict[str, Any], size: int, left: bool) -> tuple[Tensor | None, Tensor | None]:
    """Put padding into the text's mask, in place, where the text has no tokens that stand for images or sounds."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.shape != ids.shape or ids.dim() != 2:
        return None, None
    if len(ids) != size:
        return None, None
    beside = any(name.startswith(("pixel_values", "input_features", "input_values")) for name in inputs)
    length = ids.shape[1]
    lengths = torch.tensor([length - (3 * i + 1) % 5 for i in range(size)])
    if beside and length != 12:  # its text has placeholders after the first token, so that only the end can be padding
        left, lengths = False, lengths.clamp(min=length - 4)
    positions = torch.arange(length)
    tokens = positions >= length - lengths[:, None] if left else positions < lengths[:, None]
    inputs["attention_mask"] = tokens.to(mask.dtype)
    return tokens, None


def _packed(model: PreTrainedModel) -> list[Batch]:
    """Several texts one after the other in a row, told by positions that begin anew; no mask."""
    names = inspect.signature(model.forward).parameters
    if "position_ids" not in names or "input_ids" not in names:
        raise Inapplicable("it takes no positions")
    if getattr(model.config, "is_encoder_decoder", False):
        raise Inapplicable("an encoder-decoder model")
    made = []
    for index in range(6):
        inputs = example_inputs(model, 1)
        if set(inputs) - {"input_ids", "attention_mask", "token_type_ids"}:
            raise Inapplicable("it takes more than a text")
        ids = torch.cat([_varied(model, inputs, 1, 10 * index + part).inputs["input_ids"] for part in range(2)], 1)
        half, cut = ids.shape[1] // 2, 3 + index % 3
        positions = torch.cat([torch.arange(half + cut), torch.arange(ids.shape[1] - half - cut)])[None]
        if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xlm-roberta-xl"):
            positions = positions + 2
        # with a cache, which the forward makes by default, transformers would not tell the texts by their positions
        made.append(
            Batch({"input_ids": ids, "position_ids": positions} | ({"use_cache": False} if "use_cache" in names else {}), 1)
        )
    return made


@contextlib.contextmanager
def quiet_random(seed: int = 0) -> Iterator[None]:
    """Within the block, torch draws the same numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
