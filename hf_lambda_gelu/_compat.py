"""Private names of torch and transformers, in one place: where a release may rename something, this file is what changes.

Each function is one private name and nothing else. Imports torch alone, so that every room may import it.

One name cannot stand here: transformers sets `_is_hf_initialized` on modules, and `LambdaGELU` has a property of that name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _device as device_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, Trainer

__all__ = [
    "OpOverload",
    "TorchDispatchMode",
    "attention_implementations",
    "auto_mapping",
    "collator_of",
    "compile_stance",
    "dispatch_modes",
    "finish_current_push",
    "forward_before_accelerate",
    "function_modes",
    "functorch_active",
    "generation_config_in_config",
    "is_compiled",
    "jit_traces",
    "mode_stack",
    "operator_schema",
    "push_jobs",
    "put_compile_stance",
    "put_mode_stack",
    "pytree",
    "share_hooks",
    "stacked",
    "transformed",
    "view_base",
    "was_loaded",
    "without_torch_function",
    "write_beside_bars",
]

# Whether torch.func (grad, vmap, jvp …) transforms the code that runs. Not wrapped: it runs at every call of an activation.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# Whether a tensor is a stack of gradients, of torch.autograd.grad(…, is_grads_batched=True), which has no memory of its own.
stacked: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

# How many function modes are on, each of which sees every operation. Not wrapped either.
function_modes: Callable[[], int] = torch._C._len_torch_function_stack

# How many dispatch modes are on, each of which sees every operator.
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# Whether torch.jit.trace records what runs.
jit_traces: Callable[[], bool] = torch._C._is_tracing


def transformed() -> bool:
    """Whether torch's operations alone are to run: within torch.func (grad, vmap, jvp …), forward-mode AD, or
    torch.jit.trace, but for ONNX."""
    return functorch_active() or forward_ad._current_level >= 0 or (jit_traces() and not torch.onnx.is_in_onnx_export())


def without_torch_function() -> AbstractContextManager[Any]:
    """Within the block, operations on tensors do not call `__torch_function__`."""
    return cast(AbstractContextManager[Any], torch._C.DisableTorchFunctionSubclass())


def mode_stack() -> tuple[list[Any], int, torch.device | None]:
    """The function modes that are on, outermost first; how many dispatch modes are; and the device of `with device`."""
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(index) for index in range(count)]
    return modes, len(_get_current_dispatch_mode_stack()), device_mode.CURRENT_DEVICE


def put_mode_stack(before: tuple[list[Any], int, torch.device | None]) -> None:
    """Let the modes be those that `mode_stack` returned."""
    modes, dispatch_modes, device = before
    while len(_get_current_dispatch_mode_stack()) > dispatch_modes:
        _pop_dispatch()
    if mode_stack()[0] != modes:
        while torch._C._len_torch_function_stack():
            _pop_mode()
        for mode in modes:
            _push_mode(mode)
    device_mode.CURRENT_DEVICE = device


def compile_stance() -> Any:
    """What `torch.compiler.set_stance` has set; None before torch.compile was imported."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return getattr(frames, "_stance", None)


def put_compile_stance(before: Any) -> None:
    """Let the stance be what `compile_stance` returned."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None or compile_stance() == before:
        return
    if before is None:
        torch.compiler.set_stance("default")
    else:
        frames._set_stance(before)


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of, None if it is none."""
    return tensor._base


def operator_schema(operator: OpOverload) -> torch.FunctionSchema:
    """Name and arguments of one overload of an operator."""
    return operator._schema


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made this module, or `module.compile()` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def forward_before_accelerate(model: nn.Module) -> Callable[..., Any] | None:
    """The forward that accelerate has wrapped in autocast (`Accelerator.prepare` with bf16 or fp16), None if it has not."""
    found: Callable[..., Any] | None = vars(model).get("_original_forward")
    return found


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# whose hooks belong to a module's weights
_ENGINES = ("hf_lambda_gelu.", "torch.distributed.", "deepspeed.", "accelerate.")


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Lets `other` have the hooks that a user has on `module`, if any; what a handle removes is gone from both."""
    found = {name: vars(module)[name] for name in _HOOKS if name in vars(module)}
    hooks = [hook for each in found.values() if isinstance(each, dict) for hook in each.values()]
    if hooks and not any(str(getattr(hook, "__module__", "")).startswith(_ENGINES) for hook in hooks):
        vars(other).update(found)


def was_loaded(parameter: Tensor) -> bool:
    """Whether `from_pretrained` found the parameter in the checkpoint."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def attention_implementations(model: nn.Module) -> dict[str, str]:
    """{module name: what computes attention ("sdpa", "eager" …)} by the modules' configs; parts may have another than the
    whole."""
    found = {
        name: getattr(getattr(module, "config", None), "_attn_implementation", None)
        for name, module in model.named_modules()
    }
    return {name: value for name, value in found.items() if isinstance(value, str)}


def auto_mapping(auto: object) -> Mapping[str, str | Sequence[str]]:
    """{model type: name or names of its classes} of an `AutoModelFor…` class, empty for anything else."""
    return getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None) or {}


def generation_config_in_config(folder: Path, config_name: str) -> GenerationConfig:
    """The generation settings that an old checkpoint has in its config.json."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, config_file_name=config_name, _from_model_config=True)


def with_generation(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A model class of a checkpoint's own code, with `generate` where it is older than transformers' own way to say so."""
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    return add_generation_mixin_to_remote_model(cls)  # type: ignore[no-any-return]


def own_code_of(thing: object) -> bool:
    """Whether `save_pretrained` of this model, config, tokenizer or processor writes the code of its class too."""
    return getattr(thing, "_auto_class", None) is not None


def finish_current_push(trainer: Trainer) -> None:
    """Waits for the push to the Hub that the trainer has under way."""
    trainer._finish_current_push()


def push_jobs(trainer: Trainer) -> list[Future[Any]]:
    """The uploads of the push to the Hub that the trainer has begun last."""
    return list(getattr(getattr(trainer, "push_in_progress", None), "jobs", None) or ())


def collator_of(trainer: Trainer) -> Callable[[list[Any]], Any]:
    """The trainer's collator, which leaves out the columns that the model does not take, if its arguments say so."""
    return trainer._get_collator_with_removed_columns(trainer.data_collator, description="Evaluation")


def write_beside_bars(text: str) -> None:
    """Prints on standard output; the progress bars that transformers draws stay whole."""
    from transformers import trainer_callback

    bars = getattr(trainer_callback, "tqdm", None)
    print(text) if bars is None else bars.write(text)
