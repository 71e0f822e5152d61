"""Three ways to load a smooth checkpoint: with the package, folded, and by the checkpoint's own code."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.processes import in_fork
from torch import nn
from transformers import AutoConfig, AutoModel

import hf_lambda_gelu as hlg

WITHOUT = """
import sys
sys.modules["hf_lambda_gelu"] = None
import torch, transformers
from support import tiny
from safetensors.torch import load_file, save_file
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    batch = load_file(folder + ".inputs")
    outputs = tiny.outputs(model, batch)
    model(**batch)[0].sum().backward()
    slopes = [p.grad for n, p in model.named_parameters() if n.endswith("unclipped_hardness")]
    save_file({f"{i:03}": t.contiguous() for i, t in enumerate([*outputs, *slopes])}, folder + ".outputs")
"""
AUTOS = {
    "bert": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "clip": "AutoModel",
    "llama": "AutoModelForCausalLM",
}


def hardened(name: str) -> nn.Module:
    model = tiny.build(name)
    hlg.convert(model)
    tiny.set_hardness(model, 1.37, step=0.83)
    return model


def test_by_its_own_code(tmp_path: Path) -> None:
    """In processes that cannot import the package: function and gradients of λ, for each of the four bases."""
    arguments = []
    for name, auto in AUTOS.items():
        hlg.save_with_code(hardened(name), tmp_path / name)
        save_file(tiny.inputs(tiny.build(name)), tmp_path / f"{name}.inputs")
        arguments += [str(tmp_path / name), auto]
        code = (tmp_path / name / "modeling_lambda_gelu.py").read_text()
        assert len(code.splitlines()) < 60
        assert "hf_lambda_gelu" not in {n for node in ast.walk(ast.parse(code)) for n in imported(node)}
    process = in_fork(WITHOUT, *arguments, env={**os.environ, "HF_HOME": str(tmp_path / "home")})
    assert process.returncode == 0, process.stderr[-3000:]
    for name in AUTOS:
        model = hardened(name)
        batch = tiny.inputs(model)
        outputs = tiny.outputs(model, batch)
        model(**batch)[0].sum().backward()
        slopes = [site.unclipped_hardness.grad for site in hlg.hardness_sites(model).values()]
        got = list(load_file(tmp_path / f"{name}.outputs").values())
        assert tiny.relative_difference(outputs, got[: len(outputs)]) <= 1e-5, name
        torch.testing.assert_close(torch.cat(got[len(outputs) :]), torch.cat(slopes), rtol=1e-3, atol=1e-4)


def imported(node: ast.AST) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []


def test_with_the_package(tmp_path: Path) -> None:
    """The file is not needed then, and λ goes on being this package's."""
    model = hardened("bert")
    hlg.save_with_code(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert hlg.hardness_profile(loaded) == pytest.approx(hlg.hardness_profile(model))
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoModelForMaskedLM": "modeling_lambda_gelu.LambdaGELUBertForMaskedLM"
    }
    assert tiny.relative_difference(tiny.outputs(model, b := tiny.inputs(model)), tiny.outputs(loaded.eval(), b)) == 0.0


def test_refused(tmp_path: Path) -> None:
    from support.bloom import bloom

    hard_coded = bloom()
    hlg.convert(hard_coded, hard_coded=True)
    for model, message in (
        (tiny.build("bert"), "has no λ-GELU"),
        (hard_coded, r"gelu_impl, which the class hard-codes: fold"),
    ):
        with pytest.raises(ValueError, match=message):
            hlg.save_with_code(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


CUSTOM = """
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

class OwnConfig(PreTrainedConfig):
    model_type = "own-architecture"
    def __init__(self, hidden_act="gelu", size=16, **kwargs):
        self.hidden_act, self.size = hidden_act, size
        super().__init__(**kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "features"
    def __init__(self, config):
        super().__init__(config)
        self.up, self.act = nn.Linear(8, config.size), ACT2FN[config.hidden_act]
        self.down, self.last = nn.Linear(config.size, 8), nn.GELU()
        self.post_init()
    def forward(self, features, return_dict=None):
        return {"logits": self.last(self.down(self.act(self.up(features))))}
"""


def test_an_architecture_under_trust_remote_code(tmp_path: Path) -> None:
    """Code that came with a checkpoint is probed like any other; what it hard-codes is told; the ReLU checkpoint loads."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "modeling_own.py").write_text(CUSTOM)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (tmp_path / "own" / "config.json").write_text(json.dumps({"model_type": "own-architecture", "auto_map": auto}))
    config = AutoConfig.from_pretrained(tmp_path / "own", trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    features = torch.randn(4, 8)
    expected = model(features)["logits"]
    report = hlg.convert(model)
    assert [site.name for site in report.sites] == ["act"]
    assert [item.name for item in report.unconverted] == ["last"]
    torch.testing.assert_close(model(features)["logits"], expected)
    hlg.relu_ize(model, force=True)
    model.save_pretrained(tmp_path / "relu")
    loaded = AutoModel.from_pretrained(tmp_path / "relu", trust_remote_code=True).eval()
    assert (loaded.config.hidden_act, type(loaded.act).__name__) == ("relu", "ReLU")
    assert torch.equal(loaded(features)["logits"], model(features)["logits"])
