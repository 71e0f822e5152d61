"""Checkpoint folders converted and substituted as files: what the model in memory would save, to the bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.folders import LEAF, digests, inodes, load, read, same_tensors, stored
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

NAMES = ["bert", "albert", "electra", "vit", "t5", "whisper", "gpt2", "llama", "clip", "wav2vec2"]


def mixtral() -> PreTrainedModel:
    """Its experts are saved under other names, and as other tensors, than the model has them."""
    torch.manual_seed(0)
    config = MixtralConfig(**tiny.GATED, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def llava() -> PreTrainedModel:
    """Its language model is saved under another prefix than the model has it."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**tiny.VISION, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny.GATED), image_token_index=98)
    return LlavaForConditionalGeneration(config).eval()


def build(name: str) -> PreTrainedModel:
    return {"mixtral": mixtral, "llava": llava}[name]() if name in ("mixtral", "llava") else tiny.build(name)


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
