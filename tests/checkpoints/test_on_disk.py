"""Checkpoint folders converted and substituted as files: what the model in memory would save, to the bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import tiny
from support.stock import stock_outputs
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    CLIPVisionConfig,
    GenerationConfig,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import on_disk_files as checkpoints
from hf_lambda_gelu.checkpoints import shards as safetensors_files

NAMES = ["bert", "albert", "electra", "vit", "t5", "whisper", "gpt2", "llama", "clip", "wav2vec2"]
LEAF = "raw_hardness"


def mixtral() -> PreTrainedModel:
    """Its experts are saved under other names, and as other tensors, than the model has them."""
    torch.manual_seed(0)
    config = MixtralConfig(**tiny._GATED, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def llava() -> PreTrainedModel:
    """Its language model is saved under another prefix than the model has it."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**tiny._VISION, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny._GATED), image_token_index=98)
    return LlavaForConditionalGeneration(config).eval()


def build(name: str) -> PreTrainedModel:
    return {"mixtral": mixtral, "llava": llava}[name]() if name in ("mixtral", "llava") else tiny.build(name)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the weight files, each of which must be in the index if there is one."""
    found: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not set(tensors) & set(found)
        found |= tensors
        places |= dict.fromkeys(tensors, path.name)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = folder / "model.safetensors.index.json"
    assert index.is_file() == (len(set(places.values())) > 1)
    assert not index.is_file() or json.loads(index.read_text())["weight_map"] == places
    return found


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def load(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """With no key too few or too many, and parameters where their products are to the last bit the same."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@pytest.mark.parametrize("name", [*NAMES, "mixtral", "llava"])
def test_convert_is_what_memory_makes(name: str, tmp_path: Path) -> None:
    """Tensors bit for bit, config, generation config and index; the shards are the source's own, and the function stays."""
    model = build(name)
    model.save_pretrained(tmp_path / "src", max_shard_size="20KB")
    before = digests(tmp_path / "src")
    report = hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst")

    memory = load(type(model), tmp_path / "src")
    expected = hlg.convert(memory)
    memory.save_pretrained(tmp_path / "memory", max_shard_size="20KB")
    same_tensors(stored(tmp_path / "dst"), stored(tmp_path / "memory"))
    assert read(tmp_path / "dst") == read(tmp_path / "memory")
    metadata = [read(tmp_path / folder, "model.safetensors.index.json")["metadata"] for folder in ("dst", "memory")]
    assert metadata[0] == metadata[1]
    assert {path.suffix for path in (tmp_path / "dst").iterdir()} == {".json", ".safetensors"}
    assert (tmp_path / "dst" / "generation_config.json").is_file() == model.can_generate()
    if model.can_generate():
        settings = [GenerationConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("dst", "memory")]
        assert settings[0] == settings[1]

    count = len(list((tmp_path / "src").glob("*.safetensors")))
    assert count > 1
    assert len(inodes(tmp_path / "src") & inodes(tmp_path / "dst")) == len(report.linked) == count
    assert (report.copied, report.rewritten) == ((), ())
    assert (report.model.sites, report.model.attributes) == (expected.sites, expected.attributes)
    assert digests(tmp_path / "src") == before
    loaded = load(type(model), tmp_path / "dst")
    assert set(hlg.hardness_profile(loaded).values()) == {1.0}
    if name in tiny.MODELS:
        batch = tiny.inputs(model)
        assert tiny.relative_difference(tiny.outputs(memory, batch), tiny.outputs(loaded, batch)) == 0.0
        assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(loaded, batch)) <= 1e-5


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Hardened checkpoints in shards, substituted as files and in memory; all loaded and run in one stock process."""
    root, made = tmp_path_factory.mktemp("relu"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # drawing takes longer than all else
        for name in NAMES:
            model = tiny.build(name)
            hlg.convert(model)
            wanted = tiny.set_hardness(model, 400.0, step=31.0)
            model.save_pretrained(root / "src" / name, max_shard_size="20KB")
            before = digests(root / "src" / name)
            report = hlg.relu_ize_checkpoint(root / "src" / name, root / name)
            assert digests(root / "src" / name) == before
            memory = load(type(model), root / "src" / name)
            hlg.relu_ize(memory)
            hlg.save_relu_pretrained(memory, root / "memory" / name)
            made[name] = (memory, wanted, report, tiny.inputs(model))
    stock = stock_outputs({name: (type(m).__name__, batch) for name, (m, _, _, batch) in made.items()}, root)
    return root, {name: (*entry, stock[name]) for name, entry in made.items()}


@pytest.mark.parametrize("name", NAMES)
def test_relu_ize_is_what_memory_makes(name: str, relu: tuple[Path, dict[str, Any]]) -> None:
    """Tensors, config, card and λ profile; a stock process computes the same; only shards that held λ are new."""
    root, made = relu
    memory, wanted, report, batch, stock = made[name]
    src, dst = root / "src" / name, root / name
    same_tensors(stored(dst), stored(root / "memory" / name))
    assert read(dst) == read(root / "memory" / name)
    assert read(dst, "lambda_gelu.json") == read(root / "memory" / name, "lambda_gelu.json")
    assert (dst / "README.md").read_text() == (root / "memory" / name / "README.md").read_text()
    assert report.model.profile == pytest.approx(wanted, rel=1e-6)
    assert tiny.relative_difference(tiny.outputs(memory, batch), stock) == 0.0

    clean = [path for path in src.glob("*.safetensors") if not any(LEAF in key for key in load_file(path))]
    mixed = [p for p in src.glob("*.safetensors") if len({LEAF in key for key in load_file(p)}) == 2]
    assert {path.stat().st_ino for path in clean} == inodes(dst) & inodes(src)
    assert (len(report.linked), len(report.copied), len(report.rewritten)) == (len(clean), 0, len(mixed))
    assert {path.name for path in dst.glob("*.safetensors")} == {*report.linked, *report.rewritten}


def test_rewritten_file(tmp_path: Path) -> None:
    """To the byte what safetensors itself writes of the tensors that stay, of all sizes of element, chunks and odd names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.arange(3),
        "wéights": torch.randn(700, 900, generator=generator),
        f"a.{LEAF}": torch.full((1,), -3.5),
        f"z.{LEAF}": torch.full((1,), 7.5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "all", metadata={"made by": "hand"})
    kept = {key: tensor for key, tensor in tensors.items() if LEAF not in key}
    save_file(kept, tmp_path / "expected", metadata={"made by": "hand"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "_CHUNK", 4099)
        safetensors_files.write_without(tmp_path / "all", tmp_path / "kept", set(tensors) - set(kept))
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "expected").read_bytes()

    # a writer that does not sort: eight-byte elements behind the λ would come to lie at an odd place
    header = {"s": ("F32", [1], 4), "x": ("F32", [1], 4), "n": ("I64", [2], 16)}
    end, entries = 0, {}
    for key, (dtype, shape, size) in header.items():
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    data = torch.tensor([1.0, 2.0]).numpy().tobytes() + torch.tensor([5, 6]).numpy().tobytes()
    (tmp_path / "unsorted").write_bytes(len(text).to_bytes(8, "little") + text + data)
    safetensors_files.write_without(tmp_path / "unsorted", tmp_path / "aligned", {"s"})
    same_tensors(load_file(tmp_path / "aligned"), {"x": torch.tensor([2.0]), "n": torch.tensor([5, 6])})
    raw = (tmp_path / "aligned").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length + json.loads(raw[8 : 8 + length])["n"]["data_offsets"][0]) % 8 == 0


def test_one_file_and_back(tmp_path: Path) -> None:
    """A single file becomes shard 1 of 2, and is a single file again after the substitution: the same one all the way."""
    tiny.build("bert").save_pretrained(tmp_path / "src")
    report = hlg.convert_checkpoint(tmp_path / "src", tmp_path / "lambda", 300.0)
    assert report.linked == ("model-00001-of-00002.safetensors",)
    load(BertForMaskedLM, tmp_path / "lambda")
    back = hlg.relu_ize_checkpoint(tmp_path / "lambda", tmp_path / "relu")
    assert (back.linked, back.rewritten) == (("model.safetensors",), ())
    assert inodes(tmp_path / "relu") == inodes(tmp_path / "src")
    assert not (tmp_path / "relu" / "model.safetensors.index.json").exists()
    assert list(back.model.profile.values()) == [pytest.approx(300.0)] * 3


def test_options(tmp_path: Path) -> None:
    """`init_hardness` and `only`, as convert has them."""
    model = tiny.build("clip")
    model.save_pretrained(tmp_path / "src")

    def only(name: str, module: nn.Module) -> bool:
        return name.startswith("text_model")

    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst", 1.75, only=only)
    memory = type(model).from_pretrained(tmp_path / "src")
    hlg.convert(memory, 1.75, only=only)
    memory.save_pretrained(tmp_path / "memory")
    same_tensors(stored(tmp_path / "dst"), stored(tmp_path / "memory"))
    assert read(tmp_path / "dst") == read(tmp_path / "memory")
    assert len(hlg.hardness_sites(load(type(model), tmp_path / "dst"))) == 2
    with pytest.raises(ValueError, match=r"0\.5"):
        hlg.convert_checkpoint(tmp_path / "src", tmp_path / "other", 0.5)


def test_half_precision(tmp_path: Path) -> None:
    """λ is fp32 in a bf16 checkpoint, and a λ that somebody stored as bf16 is read."""
    model = tiny.build("llama").bfloat16()
    model.save_pretrained(tmp_path / "src")
    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst", 700.0)
    memory = type(model).from_pretrained(tmp_path / "src")
    hlg.convert(memory, 700.0)
    memory.save_pretrained(tmp_path / "memory")
    same_tensors(stored(tmp_path / "dst"), load_file(tmp_path / "memory" / "model.safetensors"))
    assert read(tmp_path / "dst") == read(tmp_path / "memory")
    assert read(tmp_path / "dst")["dtype"] == "bfloat16"

    path = tmp_path / "dst" / "model-00002-of-00002.safetensors"
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    report = hlg.relu_ize_checkpoint(tmp_path / "dst", tmp_path / "relu")
    assert list(report.model.profile.values()) == [pytest.approx(700.0, rel=1e-2)] * 2
    assert {tensor.dtype for tensor in stored(tmp_path / "relu").values()} == {torch.bfloat16}


def test_names_without_prefix(tmp_path: Path) -> None:
    """GPT-2 of the Hub: the config names the LM, the tensors lack its prefix, an old index lists each of them."""
    model = tiny.build("gpt2")
    model.save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    assert "wte.weight" in tensors
    save_file(tensors, path, metadata={"format": "pt"})
    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst", 170.0)
    loaded = load(GPT2LMHeadModel, tmp_path / "dst")
    assert list(hlg.hardness_profile(loaded).values()) == [pytest.approx(170.0)] * 2
    batch = tiny.inputs(model)
    hlg.convert(model, 170.0)
    assert tiny.relative_difference(tiny.outputs(model, batch), tiny.outputs(loaded, batch)) == 0.0
    hlg.relu_ize_checkpoint(tmp_path / "dst", tmp_path / "relu")
    hlg.relu_ize(model)
    final = tiny.outputs(load(GPT2LMHeadModel, tmp_path / "relu"), batch)
    assert tiny.relative_difference(tiny.outputs(model, batch), final) == 0.0


@pytest.mark.parametrize("name", ["mixtral", "llava"])
def test_relu_where_names_differ(name: str, tmp_path: Path) -> None:
    """λ is found under the names that save_pretrained gave it."""
    model = build(name)
    hlg.convert(model)
    wanted = tiny.set_hardness(model, 400.0, step=11.0)
    model.save_pretrained(tmp_path / "src")
    assert not {f"{site}.{LEAF}" for site in wanted} & set(stored(tmp_path / "src")), "the names do not differ"
    report = hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert report.model.profile == pytest.approx(wanted, rel=1e-6)
    hlg.relu_ize(model)
    model.save_pretrained(tmp_path / "memory")
    same_tensors(stored(tmp_path / "dst"), stored(tmp_path / "memory"))


def test_settings_of_generation_in_an_old_config(tmp_path: Path) -> None:
    """They stand in config.json, which is written anew without them."""
    model = tiny.build("whisper")
    model.save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "generation_config.json").unlink()
    (tmp_path / "src" / "config.json").write_text(json.dumps(read(tmp_path / "src") | {"num_beams": 3, "max_length": 17}))
    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    memory = type(model).from_pretrained(tmp_path / "src")
    hlg.convert(memory)
    memory.save_pretrained(tmp_path / "memory")
    settings = [GenerationConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("dst", "memory")]
    assert settings[0] == settings[1]
    assert (settings[0]["num_beams"], settings[0]["max_length"]) == (3, 17)
    assert read(tmp_path / "dst") == read(tmp_path / "memory")


def test_quantised(tmp_path: Path) -> None:
    """Weights that are packed, and a library that is not installed: files and config stay as they are but for λ."""
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors |= {key: torch.zeros(592, 1, dtype=torch.uint8), f"{key}.absmax": torch.ones(19)}
    save_file(tensors, path, metadata={"format": "pt"})
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = read(tmp_path / "src") | {"quantization_config": quantisation}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    hlg.convert_checkpoint(tmp_path / "src", tmp_path / "dst", 300.0)
    found = stored(tmp_path / "dst")
    assert {k: v for k, v in read(tmp_path / "dst").items() if config.get(k) != v} == {"hidden_act": "lambda_silu"}
    assert set(found) - set(tensors) == {f"model.layers.{i}.mlp.act_fn.{LEAF}" for i in (0, 1)}
    hlg.relu_ize_checkpoint(tmp_path / "dst", tmp_path / "relu")
    same_tensors(stored(tmp_path / "relu"), tensors)
    assert {k: v for k, v in read(tmp_path / "relu").items() if config.get(k) != v} == {"hidden_act": "relu"}


def test_refusals_of_relu_ize(tmp_path: Path) -> None:
    """Word for word those of relu_ize, decided by the λ in the file; nothing is made."""
    model = tiny.build("bert")
    model.save_pretrained(tmp_path / "gelu")
    hlg.convert(model)
    wanted = tiny.set_hardness(model, 50.0, step=60.0)
    model.save_pretrained(tmp_path / "soft")
    for folder, options in [("soft", {}), ("soft", {"targets": {"x": 1.0}}), ("gelu", {})]:
        memory = BertForMaskedLM.from_pretrained(tmp_path / folder)
        with pytest.raises((ValueError, hlg.SoftGateError)) as expected:
            hlg.relu_ize(memory, **options)
        with pytest.raises(type(expected.value)) as caught:
            hlg.relu_ize_checkpoint(tmp_path / folder, tmp_path / "dst", **options)
        assert str(caught.value) == str(expected.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["gelu", "soft"]
    report = hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "forced", force=True)
    assert report.model.forced
    assert not hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "tolerant", tolerance=0.02).model.forced
    targets = {name: value * 0.9 for name, value in wanted.items()}
    assert not hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "targets", targets=targets).model.forced
    details = hlg.CardDetails(base_model="google-bert/bert-base-uncased", license="apache-2.0")
    hlg.relu_ize_checkpoint(tmp_path / "soft", tmp_path / "card", force=True, details=details)
    assert "base_model: google-bert/bert-base-uncased" in (tmp_path / "card" / "README.md").read_text()


def edited_hardness(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_hardness_that_is_damaged_or_strange(tmp_path: Path) -> None:
    """NaN; none at all, which is λ = 1 as for from_pretrained; of another class's name; beside a config of GELU."""
    model = tiny.build("bert")
    hlg.convert(model, 200.0)
    model.save_pretrained(tmp_path / "good")
    names = [key for key in stored(tmp_path / "good") if LEAF in key]

    def variant(name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        edited_hardness(tmp_path / name, edit)
        return tmp_path / name

    nan = variant("nan", lambda tensors: tensors[names[0]].fill_(torch.nan))
    with pytest.raises(ValueError, match="finite"):
        hlg.relu_ize_checkpoint(nan, tmp_path / "dst")
    gone = variant("gone", lambda tensors: [tensors.pop(name) for name in names])
    torch.use_deterministic_algorithms(True)  # with which memory that nobody has set is NaN
    try:
        with pytest.raises(hlg.SoftGateError, match="has λ = 1,"):
            hlg.relu_ize_checkpoint(gone, tmp_path / "dst")
    finally:
        torch.use_deterministic_algorithms(False)
    other = variant("other", lambda tensors: tensors.update({f"x.{names[0]}": tensors.pop(names[0])}))
    with pytest.raises(hlg.CheckpointError, match=r"holds x\.bert.* knows nothing, and lacks bert"):
        hlg.relu_ize_checkpoint(other, tmp_path / "dst")
    (tmp_path / "good" / "config.json").write_text(json.dumps(read(tmp_path / "good") | {"hidden_act": "gelu"}))
    with pytest.raises(hlg.CheckpointError, match=r"hold bert\..*raw_hardness already"):
        hlg.convert_checkpoint(tmp_path / "good", tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "good", "nan", "other"]


def _sharded(root: Path) -> Path:
    tiny.build("bert").save_pretrained(root / "src", max_shard_size="20KB")
    return root / "src"


def _pickled(src: Path) -> None:
    for path in src.glob("model*"):
        path.unlink()
    torch.save(tiny.build("bert").state_dict(), src / "pytorch_model.bin")


def _retold(src: Path, **values: Any) -> None:
    (src / "config.json").write_text(json.dumps(read(src) | values))


def _index(src: Path, **places: str) -> None:
    path = src / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= places
    path.write_text(json.dumps(index))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


FIRST = "model-00001-of-00005.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda src: (src / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda src: (src / "config.json").write_text("{"), "makes no config"),
    "unknown type": (lambda src: _retold(src, model_type="nonesuch"), "makes no config.*nonesuch"),
    "unknown class": (lambda src: _retold(src, architectures=["NoSuchModel"]), "'NoSuchModel', which transformers"),
    "no class": (lambda src: _retold(src, architectures=None), "'none', which transformers"),
    "other sizes": (lambda src: _retold(src, intermediate_size=38), "BertForMaskedLM does not load"),
    "pickle": (_pickled, r"\(pytorch_model\.bin\).*BertForMaskedLM\.from_pretrained\(.*\)\.save_pretrained"),
    "adapters": (lambda src: (src / "adapter_config.json").write_text("{}"), r"merge_and_unload\(\)"),
    "no weights": (
        lambda src: [path.unlink() for path in src.glob("model*")],
        "holds no weights: expected model.safetensors",
    ),
    "shard missing": (lambda src: (src / FIRST).unlink(), f"1 of [0-9]+ shards are missing .*{FIRST}"),
    "shard truncated": (lambda src: _truncate(src / FIRST), f"{FIRST}' is damaged"),
    "header corrupted": (lambda src: (src / FIRST).write_bytes(b"\xff" * 100), f"{FIRST}' is damaged"),
    "empty file": (lambda src: (src / FIRST).write_bytes(b""), f"{FIRST}' is damaged"),
    "tensor absent": (lambda src: _index(src, ghost=FIRST), f"says that {FIRST} holds ghost, which it does not"),
    "index outside": (lambda src: _index(src, ghost="../other.safetensors"), r"'\.\./other\.safetensors'"),
    "index damaged": (
        lambda src: (src / "model.safetensors.index.json").write_text("[]"),
        "expected JSON with a weight_map",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_sources(what: str, tmp_path: Path) -> None:
    """Each is told before anything is made, for both verbs."""
    src = _sharded(tmp_path)
    assert (src / FIRST).is_file()
    damage, message = DAMAGE[what]
    damage(src)
    before = digests(src)
    for verb in (hlg.convert_checkpoint, hlg.relu_ize_checkpoint):
        with pytest.raises(hlg.CheckpointError, match=message):
            verb(src, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert digests(src) == before


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that are no folder and targets that are in use; an empty folder is taken."""
    src = _sharded(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for verb in (hlg.convert_checkpoint, hlg.relu_ize_checkpoint):
        with pytest.raises(hlg.CheckpointError, match=r"no folder 'google-bert/bert-base-uncased'.*snapshot_download"):
            verb("google-bert/bert-base-uncased", tmp_path / "dst")
        with pytest.raises(hlg.CheckpointError, match="pass the folder that it lies in"):
            verb(src / FIRST, tmp_path / "dst")
        for target in (src, src / "inside" / "it", tmp_path / "full" / ".." / "src"):
            with pytest.raises(ValueError, match="or lies in it"):
                verb(src, target)
        for target, message in ((tmp_path / "full", "not empty"), (tmp_path / "full" / "file", "a file")):
            with pytest.raises(ValueError, match=message):
                verb(src, target)
    with pytest.raises(ValueError, match="cannot write into"):
        hlg.convert_checkpoint(src, tmp_path / "full" / "file" / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "src"]
    assert not (src / "inside").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    hlg.convert_checkpoint("src", "empty")
    load(BertForMaskedLM, tmp_path / "empty")
    with pytest.raises(hlg.ConversionError, match="already: it has 3"):
        hlg.convert_checkpoint("empty", "twice")
    hlg.relu_ize_checkpoint("empty", "relu", force=True)
    with pytest.raises(hlg.ConversionError, match="ReLU network already"):
        hlg.convert_checkpoint("relu", "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_crash(error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the weight files are in place and the index is not: nothing is left of the target."""
    src = _sharded(tmp_path)
    hlg.convert_checkpoint(src, tmp_path / "lambda")
    before = digests(tmp_path)
    seen: list[int] = []

    def crash(folder: Path, *args: Any) -> None:
        seen.append(len(list(folder.glob("model-*"))))
        raise error("crash")

    monkeypatch.setattr(checkpoints, "write_index", crash)
    with pytest.raises(error, match="crash"):
        hlg.convert_checkpoint(src, tmp_path / "dst")
    with pytest.raises(error, match="crash"):
        hlg.relu_ize_checkpoint(tmp_path / "lambda", tmp_path / "dst", force=True)
    count = len(list(src.glob("*.safetensors")))
    assert seen == [count + 1, count]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lambda", "src"]
    assert digests(tmp_path) == before


KILLED = """
import os, signal, sys
import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import on_disk_files as checkpoints
checkpoints.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
hlg.convert_checkpoint(*sys.argv[1:])
"""


def test_kill(tmp_path: Path) -> None:
    """What is left has a name that says so, and is no obstacle."""
    src = _sharded(tmp_path)
    before = digests(src)
    command = [sys.executable, "-c", KILLED, str(src), str(tmp_path / "dst")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert left[0].startswith(".dst-")
    assert digests(src) == before
    hlg.convert_checkpoint(src, tmp_path / "dst")
    load(BertForMaskedLM, tmp_path / "dst")


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, and where the file system has none: copies; and too little room for them is told before."""
    src = _sharded(tmp_path)
    asked = hlg.convert_checkpoint(src, tmp_path / "asked", link=False)
    linked = hlg.convert_checkpoint(src, tmp_path / "linked")

    def no_link(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    forced = hlg.convert_checkpoint(src, tmp_path / "forced")
    for report, folder in ((asked, "asked"), (forced, "forced")):
        assert (report.linked, len(report.copied)) == ((), len(list(src.glob("*.safetensors"))))
        assert not inodes(src) & inodes(tmp_path / folder)
        assert digests(tmp_path / folder) == digests(tmp_path / "linked")
        assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / folder).iterdir())
    weights = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    assert asked.bytes_written - linked.bytes_written == weights

    def full(path: Any) -> Any:
        return shutil._ntuple_diskusage(1, 1, weights - 1)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(hlg.CheckpointError, match=rf"{weights:,} bytes of weights .* {weights - 1:,} are free"):
        hlg.convert_checkpoint(src, tmp_path / "dst")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", full)
    hlg.convert_checkpoint(src, tmp_path / "dst")  # links need no room


def test_symbolic_links(tmp_path: Path) -> None:
    """The Hub's cache: a folder of symbolic links. The files themselves are linked, not the way to them."""
    src = _sharded(tmp_path)
    (tmp_path / "cache").mkdir()
    for path in src.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(Path("..") / "src" / path.name)
    hlg.convert_checkpoint(tmp_path / "cache", tmp_path / "dst")
    assert not any(path.is_symlink() for path in (tmp_path / "dst").iterdir())
    assert inodes(src) < inodes(tmp_path / "dst")


def test_side_files(tmp_path: Path) -> None:
    """Tokenizer, card and modules of their own come along; other formats, pickles, a Trainer's state and exports do not."""
    src = _sharded(tmp_path)
    carried = ["tokenizer.json", "merges.txt", "README.md", "LICENSE", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    stale = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "tf_model.h5",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        "checkpoint-10/config.json",
        "checkpoint-10/model.safetensors",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        ".git/config",
        ".gitattributes",
    ]
    for name in carried + stale:
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text(name)
    report = hlg.convert_checkpoint(src, tmp_path / "dst")
    own = {"config.json", "model.safetensors.index.json", *(path.name for path in (tmp_path / "dst").glob("model-*"))}
    assert set(digests(tmp_path / "dst")) - own == set(carried)
    assert all((tmp_path / "dst" / name).read_text() == name for name in carried)
    dense = Path("2_Dense/model.safetensors")
    assert (src / dense).stat().st_ino == (tmp_path / "dst" / dense).stat().st_ino
    assert (src / "README.md").stat().st_ino != (tmp_path / "dst" / "README.md").stat().st_ino
    sizes = {path.stat().st_ino: path.stat().st_size for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    links = {path.stat().st_ino for path in src.rglob("*") if path.is_file()}
    assert report.bytes_written == sum(size for inode, size in sizes.items() if inode not in links)
    hlg.relu_ize_checkpoint(tmp_path / "dst", tmp_path / "relu", force=True)
    assert "LICENSE" in digests(tmp_path / "relu")
    assert (tmp_path / "relu" / "README.md").read_text() != "README.md"


def test_checkpoint_with_code(tmp_path: Path) -> None:
    """The ReLU checkpoint neither has the code nor asks for it."""
    model = tiny.build("bert")
    hlg.convert(model, 200.0)
    hlg.save_with_code(model, tmp_path / "src")
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert "auto_map" in read(tmp_path / "src")
    assert "auto_map" not in read(tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*.py"))


def test_report(tmp_path: Path) -> None:
    """The printed tables, and a frozen report."""
    src = _sharded(tmp_path)
    count = len(list(src.glob("*.safetensors")))
    first = hlg.convert_checkpoint(src, tmp_path / "dst")
    assert str(first).splitlines()[0] == "converted 3 activations to λ-GELU at λ = 1"
    size = f"{first.bytes_written:,} bytes written in all"
    assert str(first).splitlines()[-1] == f"weight files in '{tmp_path / 'dst'}': {count} linked; {size}"
    with pytest.raises(AttributeError):
        first.folder = tmp_path  # type: ignore[misc]
    model = tiny.build("bert")
    hlg.convert(model, 160.0)
    model.save_pretrained(tmp_path / "whole")
    second = hlg.relu_ize_checkpoint(tmp_path / "whole", tmp_path / "relu")
    assert str(second).splitlines()[0] == "3 activations are ReLU now"
    assert "': 1 rewritten without λ; " in str(second).splitlines()[-1]
    assert second.folder == tmp_path / "relu"


MEMORY = """
import json, resource, sys
from pathlib import Path
import hf_lambda_gelu as hlg
root, peaks = Path(sys.argv[1]), []
def peak():
    if sys.platform == "linux":  # where a process has inherited ru_maxrss from the one that started it
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def work(name, count, target):
    hlg.convert_checkpoint(root / f"gelu-{name}", root / f"linked-{target}")
    hlg.convert_checkpoint(root / f"gelu-{name}", root / f"copied-{target}", link=False)
    report = hlg.relu_ize_checkpoint(root / f"lambda-{name}", root / f"streamed-{target}")
    assert len(report.rewritten) == count, report
work("1", 1, "warm")  # imports, caches
for name, count in (("1", 1), ("4", 4), ("16", 16), ("whole", 1)):
    work(name, count, name)
    peaks.append(peak())
print(json.dumps(peaks))
"""


def test_memory(tmp_path: Path) -> None:
    """From 1 shard to 4, 16 and one file of all the checkpoint grows by 130 MB, the peak by a fraction of that: linked,
    copied and streamed.
    """
    for name, count in (("1", 1), ("4", 4), ("16", 16), ("whole", 16)):
        size = "1GB" if name == "whole" else "9MB"
        model = tiny.build("llama", num_hidden_layers=count, hidden_size=64, intermediate_size=11000, head_dim=16)
        model.save_pretrained(tmp_path / f"gelu-{name}", max_shard_size=size)
        hlg.convert(model, 300.0)
        model.save_pretrained(tmp_path / f"lambda-{name}", max_shard_size=size)
    sizes = [sum(p.stat().st_size for p in (tmp_path / f"gelu-{count}").glob("*.safetensors")) for count in (1, 16)]
    assert sizes[1] - sizes[0] > 120e6
    process = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    peaks = json.loads(process.stdout.splitlines()[-1])
    assert peaks[-1] - peaks[0] < 0.1 * (sizes[1] - sizes[0]), peaks
    shutil.rmtree(tmp_path)


def test_real_model(asset: Callable[[str], Path], tmp_path: Path) -> None:
    """MiniLM: the same tensors, the tokenizer, the same embedding of a sentence."""
    minilm = asset("minilm")
    hlg.convert_checkpoint(minilm, tmp_path / "dst")
    model = BertModel.from_pretrained(minilm)
    batch = dict(AutoTokenizer.from_pretrained(tmp_path / "dst")("A man is playing a guitar.", return_tensors="pt"))
    expected = tiny.outputs(model.eval(), batch)
    loaded = load(BertModel, tmp_path / "dst")
    assert tiny.relative_difference(expected, tiny.outputs(loaded, batch)) <= 1e-5
    hlg.convert(model)
    same_tensors(dict(loaded.state_dict()), dict(model.state_dict()))
    hlg.relu_ize_checkpoint(tmp_path / "dst", tmp_path / "relu", force=True)
    hlg.relu_ize(model, force=True)
    (stock,) = stock_outputs({"relu": ("BertModel", batch)}, tmp_path).values()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert tiny.relative_difference(tiny.outputs(model, batch), stock) == 0.0
    shutil.rmtree(tmp_path)
