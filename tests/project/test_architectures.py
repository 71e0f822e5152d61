"""The coverage run: what it finds on architectures whose answer is known, and that its verdict can be bad."""

from __future__ import annotations

import pytest
from support.processes import module_in_fork

from scripts.architectures import hinges, run
from scripts.architectures.run import RESULTS
from scripts.tools.tables import read

GOOD = {"effect": 0.1, "convert": 1e-7, "stock_reload": 0.0, "relu_reload": 0.0, "folded_reload": 1e-6, "untold": ""}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """In a process of its own: this one has imported the package, the one that reloads must not have."""
    results = tmp_path_factory.mktemp("coverage") / "coverage.csv"
    models = ["bert", "bloom", "mamba", "vit_msn", "t5"]
    process = module_in_fork("scripts.architectures.run", "--jobs", "1", "--results", str(results), "--models", *models)
    assert process.returncode == 0, process.stderr[-2000:]
    return {row["model_type"]: row for row in read(results)}


def test_known_answers(rows: dict[str, dict[str, str]]) -> None:
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "bert": "exact",
        "bloom": "refused",
        "mamba": "refused",
        "t5": "no GELU or SiLU",  # its default is ReLU
        "vit_msn": "exact",
    }
    assert rows["bert"]["sites"] == "2"
    assert float(rows["bert"]["relu_reload"]) == 0.0
    assert 0.0 < float(rows["bert"]["folded_reload"]) < 1e-5
    assert float(rows["bert"]["effect"]) > 1e-2, "ReLU makes no difference here, so its reload proves nothing"
    assert "BloomGelu: hard-coded" in rows["bloom"]["reason"]
    assert rows["bloom"]["folded_hard_coded"] == "2 sites"
    assert "keeps its name" in rows["mamba"]["reason"]


@pytest.mark.parametrize(
    "change",
    [
        {"convert": 1e-3},
        {"relu_reload": 1e-6},
        {"relu_reload": "KeyError: 'lambda_gelu'"},
        {"relu_keys": "layer.0.unclipped_hardness"},
        {"folded_reload": 1e-2},
        {"untold": "encoder.conv"},
    ],
)
def test_verdict(change: dict[str, object]) -> None:
    assert run.verdict(dict(GOOD)) == "exact"
    assert run.verdict({k: v for k, v in GOOD.items() if k != "folded_reload"}) == "exact"  # fold said why not
    assert run.verdict({**GOOD, **change}) == "wrong"
    assert run.verdict({**GOOD, "stock_reload": 1.0}) == "stock reload differs"
    assert run.verdict({**GOOD, "effect": 0.0}) == "not reached"


def test_comparison_and_table(rows: dict[str, dict[str, str]]) -> None:
    bert, bloom, t5 = (rows[name] for name in ("bert", "bloom", "t5"))
    new = [{**bert, "verdict": "wrong", "sites": "1"}, bloom, {**t5, "model_type": "t6"}]
    assert run.compare([bert, bloom, t5], new).splitlines() == [
        "bert AutoModel: sites 2 → 1",
        "bert AutoModel: verdict exact → wrong",
        "gone: t5 AutoModel",
        "new: t6 AutoModel: no GELU or SiLU",
    ]
    assert run.compare([bert], [bert]) == "nothing changed"
    text = run.table([bert, bloom, t5])
    assert "| exact | 1 |" in text
    assert "| refused: hard-coded modules; `hard_coded=True` folds them | bloom |" in text
    assert "| **wrong** | bert |" in run.table(new)


def test_the_table_of_hinges() -> None:
    """Of all that convert: wider layers are the sums of their hinges, reload to the bit, or are refused."""
    exact = {(row["model_type"], row["auto"]) for row in read(RESULTS) if row["verdict"] == "exact"}
    rows = {(row["model_type"], row["auto"]): row for row in read(hinges.RESULTS)}
    assert rows.keys() == exact
    wider = {key[0]: row for key, row in rows.items() if row["verdict"] == "exact"}
    assert {row["verdict"] for row in rows.values()} == {"exact", "refused"}
    for row in wider.values():
        assert float(row["sum"]) <= hinges.ROUNDING
        assert float(row["effect"]) > 1e-4, "several ReLUs make no difference here, so that the row proves nothing"
        assert float(row["reload"]) == 0.0
    assert {"bert", "gpt2", "llama", "vit", "dinov2", "whisper", "granite", "clip"} <= wider.keys()
    assert {
        "modernbert",
        "moonshine",
        "poolformer",
        "mobilevitv2",
    } <= wider.keys()
    assert {wider[name]["biases"] for name in ("llama", "granite", "modernbert")} == {"mlp_bias"}
    assert wider["aimv2"]["biases"] == "text_config.mlp_bias vision_config.mlp_bias"
    assert wider["internlm3"]["biases"] == "attention_bias mlp_bias"  # its class takes both or none
    no_bias = {"mistral", "qwen2", "qwen3", "gemma", "gemma2", "t5gemma", "qwen2_moe", "phi3"}
    kinds = {key[0]: hinges.why(row) for key, row in rows.items() if row["verdict"] == "refused"}
    assert {kinds[name] for name in no_bias} == {"the gate's map has no bias, and the config no switch for one"}
    assert kinds["mixtral"] == "experts, whose weights are stacks without biases"
    assert kinds["convnext"] == "its width is in no number of the config"


def test_a_wrong_row_of_hinges() -> None:
    good = {"sum": "4.0e-07", "reload": "0.0e+00"}
    assert hinges.verdict(good) == "exact"
    assert hinges.verdict(good | {"sum": "1.0e-04"}) == "differs"
    assert hinges.verdict(good | {"reload": "1.0e-07"}) == "differs"


def test_the_table_of_proofs() -> None:
    """Every architecture that converts is proven without inputs, in memory and from its folder; or it is known why not."""
    exact = {(row["model_type"], row["auto"]) for row in read(RESULTS) if row["verdict"] == "exact"}
    proofs = {(row["model_type"], row["auto"]): row for row in read(RESULTS.with_name("proofs.csv"))}
    assert proofs.keys() == exact
    left = {key[0]: row["reason"] for key, row in proofs.items() if row["verdict"] != "proven"}
    assert left.keys() == {"step3p7", "voxtral_realtime_text"}
    assert "relu_ize has left 3 smooth activations" in left["step3p7"]  # the config takes no ReLU for the text
    assert "no class 'VoxtralRealtimeTextModel'" in left["voxtral_realtime_text"]  # it exports none
    proven = [row for row in proofs.values() if row["verdict"] == "proven"]
    assert {row["in_memory"] for row in proven} == {"0.0e+00"}
    # the loaded one lies in a mapped file, whose alignment can change the last bit of a product
    assert sum(float(row["folder"]) > 0 for row in proven) <= 4
    assert max(float(row["folder"]) for row in proven) < 1e-6
