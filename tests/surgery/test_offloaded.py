"""Models whose weights accelerate keeps elsewhere are refused by every verb, as they were; hooks that offload nothing change
nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model, init_empty_weights
from support import tiny
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel

import hf_lambda_gelu as hlg

Offload = Callable[[Any, Path], Any]


def _by_map(model: Any, folder: Path) -> Any:
    places = {name: "cpu" for name, _ in model.named_children()}
    places[next(reversed(places))] = "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "map"))


def _by_load(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "saved")
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    leaves = [n for n, m in model.named_modules() if not any(m.children()) and not n.startswith(tuple(lists))]
    places = dict.fromkeys(leaves, "cpu")
    for name in lists:  # the first layer alone
        places |= {f"{name}.{i}": "cpu" if i else "disk" for i in range(len(model.get_submodule(name)))}
    return type(model).from_pretrained(folder / "saved", device_map=places, offload_folder=folder / "loaded")


WAYS: dict[str, Offload] = {
    "disk_offload": lambda model, folder: disk_offload(model, str(folder / "disk"), execution_device="cpu"),
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "with a hook": lambda model, folder: cpu_offload_with_hook(model, "cpu")[0],
    "dispatch_model": _by_map,
    "from_pretrained": _by_load,
}


def _trainer(model: Any, folder: Path) -> object:
    return hlg.LambdaGELUTrainer(model, hlg.LambdaGELUTrainingArguments(str(folder / "run"), use_cpu=True, report_to="none"))


BATCH = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
VERBS: dict[str, Callable[[Any, Path], object]] = {
    "relu_ize": lambda model, folder: hlg.relu_ize(model, force=True),
    "refit": lambda model, folder: hlg.relu_ize(model, calibration=[BATCH], compensate="least_squares"),
    "fold": lambda model, folder: hlg.fold(model, BATCH),
    "calibrate": lambda model, folder: hlg.calibrate(model, [BATCH]),
    "sensitivity": lambda model, folder: hlg.sensitivity(model, [BATCH]),
    "audit": lambda model, folder: hlg.audit(model, BATCH),
    "save": lambda model, folder: hlg.save_relu_pretrained(model, folder / "relu"),
    "verify": lambda model, folder: hlg.verify_relu_pretrained(model, folder / "relu", BATCH),
    "train": _trainer,
}


def build(name: str) -> PreTrainedModel:
    return tiny.build(name)


def state(model: nn.Module) -> list[tuple[str, str, str]]:
    return [
        (n, type(m).__name__, str(getattr(getattr(m, "config", None), "hidden_act", ""))) for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_convert(way: str, name: str, tmp_path: Path) -> None:
    """Refused for what it is; what the model puts out is as before."""
    model = WAYS[way](build(name), tmp_path).eval()
    before = state(model)
    with torch.no_grad():
        expected = model(**BATCH).logits
    with pytest.raises(hlg.ConversionError, match=r"offloaded by accelerate.*Load it without device_map"):
        hlg.convert(model)
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, expected)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs(verb: str, tmp_path: Path) -> None:
    """A model that was converted first and offloaded then."""
    model = build("bert").eval()
    hlg.convert(model, init_hardness=3.0)
    model = disk_offload(model, str(tmp_path / "disk"), execution_device="cpu")
    before = state(model)
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        VERBS[verb](model, tmp_path)
    assert state(model) == before
    assert not (tmp_path / "relu").exists()


def test_the_call_that_is_named(tmp_path: Path) -> None:
    """The refusal has the call to make, which is then made: what `relu_ize` does with the same model in memory."""
    model = _by_load(build("llama"), tmp_path)
    data = [{"input_ids": torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(i))} for i in range(5)]
    with pytest.raises(ValueError, match="a block at a time") as caught:
        hlg.convert(model)
    call = re.search(r"(hf_lambda_gelu\.relu_ize_checkpoint\(.*?\))\. It takes", str(caught.value))
    assert call is not None
    target = str(tmp_path / "relu")
    report = eval(call[1].replace("NEW-FOLDER", target), {"hf_lambda_gelu": hlg, "batches": data})
    whole = build("llama")
    hlg.convert(whole)
    alone = hlg.relu_ize(whole, calibration=data, compensate="least_squares")
    assert report.model.relative_change == alone.relative_change
    for name, value in type(whole).from_pretrained(target).state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_the_call_for_a_model_of_the_hub(tmp_path: Path) -> None:
    model = disk_offload(build("bert"), str(tmp_path), execution_device="cpu")
    model.name_or_path, model.hf_device_map = "google-bert/bert-base-uncased", {"bert": 0, "cls": "disk"}
    with pytest.raises(ValueError, match=r"checkpoint\(huggingface_hub\.snapshot_download\('google-bert/.*device='cuda'"):
        hlg.convert(model)
    model.name_or_path = ""
    with pytest.raises(ValueError, match=r"relu_ize_checkpoint\(src, 'NEW-FOLDER'"):
        hlg.convert(model)


def test_inside_another_module(tmp_path: Path) -> None:
    """An offloaded part of a plain module too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), cpu_offload(nn.Sequential(nn.Linear(4, 4)), execution_device="cpu"))
    with pytest.raises(hlg.ConversionError, match="offloaded by accelerate, from 2"):
        hlg.convert(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_hooks_that_offload_nothing(name: str, tmp_path: Path) -> None:
    """With all of it in memory, hooks or not, every number is the same, in wider layers too."""
    plain = build(name).eval()
    hooked = copy.deepcopy(plain)
    dispatch_model(hooked, {n: "cpu" for n, _ in hooked.named_children()}, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in hooked.modules())
    data = [{"input_ids": torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(i))} for i in range(6)]
    tables = []
    for model in (plain, hooked):
        hlg.convert(model)
        errors = [site.relative_error(2.0) for site in hlg.calibrate(model, data).sites]
        folded = copy.deepcopy(model)
        for site in hlg.hardness_sites(folded).values():
            site.set_hardness(3.0)
        if name == "gpt2":
            hlg.fold(folded, data[0])
        hlg.relu_ize(model, calibration=data, compensate="least_squares", budget=1.25 if name == "llama" else None)
        folder = tmp_path / type(model).__name__ / str(len(tables))
        hlg.save_relu_pretrained(model, folder)
        assert hlg.verify_relu_pretrained(model, folder) == 0.0
        tables.append((errors, [p.detach() for p in folded.parameters()], [p.detach() for p in model.parameters()]))
    assert tables[0][0] == tables[1][0]
    for first, second in zip(tables[0][1] + tables[0][2], tables[1][1] + tables[1][2], strict=True):
        assert torch.equal(first, second)


def test_meta() -> None:
    """A model without weights is no offloaded one: it is converted as before, and its λ are not measured."""
    with init_empty_weights():
        model = GPT2LMHeadModel(GPT2LMHeadModel.config_class(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    assert len(hlg.convert(model).sites) == 1
    with pytest.raises(ValueError, match="on the meta device"):
        hlg.calibrate(model, [BATCH])
