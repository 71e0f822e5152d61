"""The keys in transformers' tables, what importing the package leaves alone, and λ through its ways of building models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import MODELS, inputs, outputs, relative_difference
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN, get_activation
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2Config, RTDetrV2ConvNormLayer

import hf_lambda_gelu as hlg

KEYS = {
    "lambda_gelu": "gelu",
    "lambda_gelu_tanh": "gelu_tanh",
    "lambda_quick_gelu": "quick_gelu",
    "lambda_silu": "silu",
}
each_key = pytest.mark.parametrize("key", list(KEYS))
# tiny model, the config attribute of its activation, the λ-key of what it has by default
each_model = pytest.mark.parametrize(
    ("name", "attribute", "key"),
    [
        ("bert", "hidden_act", "lambda_gelu"),
        ("gpt2", "activation_function", "lambda_gelu_tanh"),
        ("llama", "hidden_act", "lambda_silu"),
    ],
)


@each_key
def test_lookup(key: str) -> None:
    """By every way transformers' models take to an activation: a new module of the right base, λ = 1, learnable."""
    ways = [lambda: ACT2FN[key], lambda: get_activation(key), lambda: ACT2CLS[key]()]
    made = [way() for way in ways for _ in range(2)]
    assert len({id(module) for module in made}) == len({id(module.unclipped_hardness) for module in made}) == 6
    for module in made:
        assert type(module) is hlg.LambdaGELU
        assert (module.base, module.hardness.item()) == (KEYS[key], 1.0)
        assert module.unclipped_hardness.requires_grad


def test_model_code_that_reads_act2cls() -> None:
    """RT-DETR v2's own layer, which calls the entry of ACT2CLS itself, computes what it computes with SiLU."""
    layers = []
    for activation in ("silu", "lambda_silu"):
        torch.manual_seed(0)
        layers.append(RTDetrV2ConvNormLayer(RTDetrV2Config(), 3, 4, 3, 1, activation=activation))
    x = torch.randn(1, 3, 8, 8)
    assert isinstance(layers[1].activation, hlg.LambdaGELU)
    torch.testing.assert_close(layers[1](x), layers[0](x))


def test_idempotent() -> None:
    """A second call leaves both tables with the very same objects."""
    before = [{k: dict.__getitem__(table, k) for k in table} for table in (ACT2FN, ACT2CLS)]
    hlg.register()
    after = [{k: dict.__getitem__(table, k) for k in table} for table in (ACT2FN, ACT2CLS)]
    assert all(list(a) == list(b) and all(a[k] is b[k] for k in a) for a, b in zip(before, after, strict=True))


@each_key
@pytest.mark.parametrize("table", [ACT2FN, ACT2CLS], ids=["ACT2FN", "ACT2CLS"])
@pytest.mark.parametrize("foreign", [nn.ReLU, (nn.LeakyReLU, {"negative_slope": 0.1})], ids=["class", "pair"])
def test_foreign_entry_is_refused(key: str, table: dict, foreign: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's entry under one of the keys: named in the error, and left in place."""
    monkeypatch.setitem(table, key, foreign)
    with pytest.raises(RuntimeError, match=f"already holds '{key}' = .*ReLU.*not from hf_lambda_gelu: remove"):
        hlg.register()
    assert dict.__getitem__(table, key) is foreign


_IMPORT = """
import json, logging, os, random, socket, sys, threading, warnings

def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse

import torch, transformers
from transformers import activations, modeling_utils, trainer, trainer_callback

torch.cuda._lazy_init = refuse
watched = [
    torch, torch.nn, torch.Tensor, torch.nn.Module, torch.nn.functional, torch.nn.modules.activation, torch.nn.GELU,
    torch.optim.Optimizer, torch.autograd.Function, activations, activations.GELUActivation, modeling_utils,
    modeling_utils.PreTrainedModel, trainer, trainer.Trainer, trainer_callback, transformers.AutoModel,
]
tables = {"ACT2FN": activations.ACT2FN, "ACT2CLS": activations.ACT2CLS}

def state():
    return {
        "environment": dict(os.environ), "path": list(sys.path), "filters": list(warnings.filters),
        "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(),
        "seed": torch.get_rng_state().tolist(), "random": random.getstate(), "loggers": str(logging.root.handlers),
        "verbosity": transformers.logging.get_verbosity(), "running": threading.active_count(),
        "hooks": [sys.excepthook, sys.displayhook],
    }

members = [dict(vars(owner)) for owner in watched]
entries = {name: {k: dict.__getitem__(t, k) for k in t} for name, t in tables.items()}
before = state()

import hf_lambda_gelu as hlg

after = state()
report = {
    "replaced": [
        f"{owner}.{name}" for owner, old in zip(watched, members) for name, value in old.items()
        if vars(owner).get(name, refuse) is not value
    ],
    "entries": {
        name: sorted(k for k in table if dict.__getitem__(table, k) is not entries[name].get(k, refuse))
        for name, table in tables.items()
    },
    "lost": [k for n, t in tables.items() for k in entries[n] if k not in t],
    "state": [k for k in before if before[k] != after[k]],
    "cuda": torch.cuda.is_initialized(),
    "matplotlib": "matplotlib" in sys.modules,
}
first = activations.ACT2FN["lambda_gelu"]
for name in [n for n in sys.modules if n.split(".")[0] == "hf_lambda_gelu"]:
    del sys.modules[name]
import hf_lambda_gelu  # imported afresh, as a notebook does: recognises its own entries
report["again"] = sorted(set(activations.ACT2FN) - set(entries["ACT2FN"])) == report["entries"]["ACT2FN"]
print(json.dumps(report))
"""


def test_import_has_no_other_side_effect(tmp_path: Path) -> None:
    """A fresh process compares itself before and after the import; sockets and CUDA refuse, the home folders start empty."""
    homes = {name: str(tmp_path / name) for name in ("HOME", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for folder in homes.values():
        Path(folder).mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | homes
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    run = subprocess.run([sys.executable, "-c", _IMPORT], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "replaced": [],
        "entries": {"ACT2FN": sorted(KEYS), "ACT2CLS": sorted(KEYS)},
        "lost": [],
        "state": [],
        "cuda": False,
        "matplotlib": False,
        "again": True,
    }
    assert [str(path) for path in tmp_path.rglob("*") if path.is_file()] == []


# --- λ through transformers' ways of building a model ---


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody initialised reads as NaN, so that a λ which transformers left alone shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def config(name: str, **values: object) -> PreTrainedConfig:
    return AutoConfig.for_model(MODELS[name][0], **MODELS[name][2], **values)


def saved_model(name: str, folder: Path, **values: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(config(name, **values)).eval()
    for index, site in enumerate(hlg.hardness_sites(model).values()):
        site.unclipped_hardness.data.fill_(0.123456789 + 0.7 * index)  # bits that bf16 cannot hold
    model.save_pretrained(folder)
    return model


def raws(model: nn.Module) -> list[float]:
    return [site.unclipped_hardness.item() for site in hlg.hardness_sites(model).values()]


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_smooth_checkpoint(name: str, attribute: str, key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint without λ, into poisoned memory: λ = 1 exactly, and the outputs of the stock model."""
    saved_model(name, tmp_path)
    stock = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    model = AutoModel.from_pretrained(tmp_path, dtype=dtype, **{attribute: key}).eval()
    assert list(hlg.hardness_profile(model).values()) == [1.0, 1.0]
    assert all(site.base == KEYS[key] for site in hlg.hardness_sites(model).values())
    assert all(p.dtype is (torch.float32 if "unclipped_hardness" in n else dtype) for n, p in model.named_parameters())
    batch = inputs(stock)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert relative_difference(outputs(stock, batch), outputs(model, batch)) < tolerance


@each_model
@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_hardness_survives_saving(
    name: str, attribute: str, key: str, saved_in: torch.dtype, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Bits of s written down before saving against bits after loading, whatever dtypes the other weights go through."""
    model = saved_model(name, tmp_path, **{attribute: key})
    bits = raws(model)
    model.to(saved_in).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    assert raws(loaded) == bits
    assert len(bits) == 2
    assert len(set(bits)) == 2
    for parameter, tensor in loaded.named_parameters():
        assert tensor.dtype is (torch.float32 if "unclipped_hardness" in parameter else dtype or saved_in)


@each_model
@pytest.mark.usefixtures("poisoned")
def test_from_config(name: str, attribute: str, key: str) -> None:
    """A model built from its config: λ = 1 and fp32 in bf16, nothing computed on meta, λ = 1 once it has memory."""
    model = AutoModel.from_config(config(name, **{attribute: key}), dtype=torch.bfloat16).eval()
    sites = hlg.hardness_sites(model).values()
    assert list(hlg.hardness_profile(model).values()) == [1.0, 1.0]
    assert {site.unclipped_hardness.dtype for site in sites} == {torch.float32}
    assert all(torch.isfinite(out).all() for out in outputs(model, inputs(model)))
    with torch.device("meta"):
        model = AutoModel.from_config(config(name, **{attribute: key}))
    assert all(site.unclipped_hardness.is_meta for site in hlg.hardness_sites(model).values())
    assert "on meta" in repr(model)
    model.to_empty(device="cpu").init_weights()
    assert list(hlg.hardness_profile(model).values()) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (torch.tensor([float("nan")]), ValueError, r"unclipped_hardness is \[nan\]: expected finite numbers"),
        (torch.tensor([float("inf")]), ValueError, r"unclipped_hardness is \[inf\]"),
        (torch.zeros(2), RuntimeError, "ignore_mismatched_sizes"),
        (torch.tensor(0.5), RuntimeError, "ignore_mismatched_sizes"),
    ],
    ids=["nan", "inf", "two", "zero-dim"],
)
def test_damaged_checkpoint(damage: torch.Tensor, error: type[Exception], message: str, tmp_path: Path) -> None:
    """One tensor of a good safetensors file is replaced: loading is refused instead of giving a model of NaN."""
    saved_model("bert", tmp_path, hidden_act="lambda_gelu")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    victim = next(k for k in tensors if "unclipped_hardness" in k)
    save_file(tensors | {victim: damage}, file, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        AutoModel.from_pretrained(tmp_path)
