"""After `relu_ize` comes llm-compressor: its folder is a ReLU network still, its card says what was done; traps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from support import tiny
from support.hub_server import HubServer
from support.models import relu_model
from support.publishing import TOKEN, not_proven
from transformers import BertForSequenceClassification, BertTokenizer, PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.compression import compression, pruned_maps
from hf_lambda_gelu.structure.quantised import quantised_weight

WIDE = {"hidden_size": 128, "intermediate_size": 256}  # groups of 128 weights need such rows
HEADS = ["re:.*pooler.*", "re:.*classifier.*"]


def llmcompressor() -> Any:
    return pytest.importorskip("llmcompressor", reason="llm-compressor needs torch 2.10, and is not in the oldest set")


def tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(94))]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 99, (32, 16), generator=generator).tolist()


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smooth")
    tiny.build("bert-classifier", **WIDE).save_pretrained(folder)
    return folder


def made_relu(smooth: Path) -> tuple[PreTrainedModel, hlg.SubstitutionReport]:
    model = BertForSequenceClassification.from_pretrained(smooth)
    hlg.convert(model)
    calibration = [{"input_ids": torch.tensor(rows()[start : start + 8])} for start in range(0, 32, 8)]
    return model, hlg.relu_ize(model, calibration=calibration, compensate="least_squares")


@pytest.fixture(scope="module")
def relu(smooth: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hlg.SubstitutionReport]:
    """The folder of the ReLU network, and what `relu_ize` reported."""
    model, report = made_relu(smooth)
    return hlg.save_relu_pretrained(model, tmp_path_factory.mktemp("relu") / "relu", processor=tokenizer()), report


def compressed(model: PreTrainedModel, *recipe: Any) -> PreTrainedModel:
    data = Dataset.from_dict({"input_ids": rows(), "attention_mask": [[1] * 16] * 32})
    llmcompressor().oneshot(
        model=model,
        dataset=data,
        recipe=list(recipe),
        processor=tokenizer(),
        max_seq_length=16,
        num_calibration_samples=len(data),
    )
    return model


def gptq(scheme: str) -> Any:
    llmcompressor()
    from llmcompressor.modifiers.quantization import GPTQModifier

    return GPTQModifier(targets=["Linear"], scheme=scheme, ignore=HEADS)


def test_gptq(relu: tuple[Path, hlg.SubstitutionReport], tmp_path: Path) -> None:
    """Packed weights, ReLU in the config, the same outputs in a process that has neither package; the card says it all."""
    folder, report = relu
    model = compressed(BertForSequenceClassification.from_pretrained(folder), gptq("W4A16"))
    batch = {"input_ids": torch.tensor(rows()[:4])}
    with torch.no_grad():
        expected = model(**batch).logits
    saved = hlg.save_relu_pretrained(model, tmp_path / "w4a16", processor=tokenizer(), report=report)

    config = json.loads((saved / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    tensors = load_file(saved / "model.safetensors")
    packed = tensors["bert.encoder.layer.1.output.dense.weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.shape == (128, 256 // 8)  # eight values of 4 bits each
    assert hlg.verify_relu_pretrained(model, saved, batch) == 0.0
    loaded = BertForSequenceClassification.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
        dense = BertForSequenceClassification.from_pretrained(folder)(**batch).logits
    assert 1e-4 < float((expected - dense).norm() / dense.norm()) < 0.5, "compressed, and still about the same network"

    text = ModelCard.load(saved / "README.md").text
    for wanted in (
        "Its weights were then quantised, which changes what it computes: see [Compression](#compression).",
        "`pip install compressed-tensors`",
        "\n## Compression\n\nLossy. What it costs in accuracy is not stated here. The sections below are about",
        f"\n- Format: compressed-tensors {config['quantization_config']['version']}\n",
        "\n- Weights of Linear: 4-bit int, a scale for each group of 128\n",
        "\n- As they were: `bert.pooler.dense`, `classifier`\n",
        "## Compensation",
    ):
        assert wanted in text, wanted
    for wrong in ("nothing else is needed", "take it as it is", "None", "are exactly 0", "\n\n\n"):
        assert wrong not in text, wrong


def test_sparse_gpt(relu: tuple[Path, hlg.SubstitutionReport], tmp_path: Path) -> None:
    """No config tells of it, so the zeros are counted."""
    llmcompressor()
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    prune = SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=HEADS)
    model = compressed(BertForSequenceClassification.from_pretrained(relu[0]), prune)
    saved = hlg.save_relu_pretrained(model, tmp_path / "pruned", processor=tokenizer())
    weight = load_file(saved / "model.safetensors")["bert.encoder.layer.0.intermediate.dense.weight"]
    assert bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all())
    text = ModelCard.load(saved / "README.md").text
    assert " % of the weights of 12 linear maps are exactly 0: two of each four in a row; they are stored as" in text
    assert "Many of its weights are exactly 0" in text
    assert "nothing else is needed" in text
    assert "take it as it is" not in text


def test_what_is_quantised_is_not_refit(smooth: Path) -> None:
    """The wrong order: GPTQ first. Said by name, and the model is as it was."""
    model = compressed(BertForSequenceClassification.from_pretrained(smooth), gptq("W8A8"))
    assert quantised_weight(model) == "bert.encoder.layer.0.attention.self.query.weight"
    hlg.convert(model)
    before = tiny.snapshot(model)
    calibration = [{"input_ids": torch.tensor(rows()[:8])}]
    with pytest.raises(ValueError, match=r"query\.weight is quantised and cannot be refit: substitute first, then quantise"):
        hlg.relu_ize(model, calibration=calibration, compensate="least_squares")
    assert tiny.snapshot(model) == before


def test_the_config_of_the_smooth_folder_is_not_saved(smooth: Path, tmp_path: Path) -> None:
    """llm-compressor writes the config of the folder that a model was loaded from, here a GELU's, beside ReLU's weights."""
    model, _ = made_relu(smooth)
    model = compressed(model, gptq("W8A8"))
    with pytest.raises(ValueError, match=r"wrote config\.hidden_act = 'gelu'.* Save the ReLU model first, load that folder"):
        hlg.save_relu_pretrained(model, tmp_path / "wrong")
    assert not list(tmp_path.iterdir())


def test_what_was_loaded_compressed_is_not_saved_again(relu: tuple[Path, hlg.SubstitutionReport], tmp_path: Path) -> None:
    model = compressed(BertForSequenceClassification.from_pretrained(relu[0]), gptq("W8A8"))
    saved = hlg.save_relu_pretrained(model, tmp_path / "w8a8")
    assert "; their inputs: 8-bit int, a scale for each token, found as it runs\n" in (saved / "README.md").read_text()
    with pytest.raises(ValueError, match=r"loaded from compressed weights.* publish the folder that it came from"):
        hlg.save_relu_pretrained(BertForSequenceClassification.from_pretrained(saved), tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["w8a8"]


# ------------------------------------------------------------------------------------------------- without the tool


def quantised_folder(folder: Path, **config: Any) -> Path:
    hlg.save_relu_pretrained(relu_model("bert-classifier"), folder, processor=tokenizer())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


@pytest.mark.parametrize("card", ["as it was", "none", "says so"])
def test_push_wants_a_card_that_says_so(card: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was compressed without this package, with the card of the network before it, or with none."""
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.prove", not_proven)
    monkeypatch.setattr("hf_lambda_gelu.checkpoints.hub.load_saved", lambda *_, **__: relu_model("bert-classifier"))
    folder = quantised_folder(tmp_path / "model", quant_method="compressed-tensors")
    readme = folder / "README.md"
    if card == "none":
        readme.unlink()
    elif card == "says so":
        readme.write_text(readme.read_text() + "\nIn compressed-tensors.\n")
    (folder / "recipe.yaml").write_text("default_stage: {}\n")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    if card == "says so":
        hlg.push_relu_to_hub(folder, "tester/relu", api=api)
        assert "recipe.yaml" in hub.repos["tester/relu"].files
        return
    told = "there is no card" if card == "none" else "its card does not say so"
    with pytest.raises(ValueError, match=rf"are quantised \(compressed-tensors\), and {told}: save the model that"):
        hlg.push_relu_to_hub(folder, "tester/relu", api=api)
    assert not hub.repos


@pytest.mark.parametrize(
    ("config", "schemes", "left"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["weights in 4 bits"], []),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ["weights in 8 bits"], []),
        ({"quant_method": "torchao", "modules_to_not_convert": ["lm_head"]}, [], ["lm_head"]),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": False},
                        "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
                    }
                },
            },
            [
                "weights of Linear: 8-bit float, a scale and a zero point for the tensor; "
                "their inputs: 8-bit float, a scale for the tensor"
            ],
            [],
        ),
    ],
)
def test_configs_in_words(config: dict[str, Any], schemes: list[str], left: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = compression(tmp_path, None)
    assert found is not None
    assert (found["quantised"]["method"], found["quantised"]["schemes"]) == (config["quant_method"], schemes)
    assert found["quantised"]["left"] == left


def test_neither() -> None:
    assert pruned_maps(relu_model("bert-classifier")) is None


def test_zeros_are_counted_by_hand() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 3), torch.nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]]))
        model[2].weight.zero_()  # an initial value, not pruning
    assert pruned_maps(model) == {"maps": 1, "zeros": 5 / 8, "two_of_four": True}
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([0.0, 1.0, 3.0, 2.0])
    assert pruned_maps(model) == {"maps": 1, "zeros": 4 / 8, "two_of_four": False}
