"""Training on a GPU against the same run on the CPU: λ, the switch with its refit, bf16, FSDP by accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.processes import in_fresh_process
from support.training import SITES, TARGET, converted, logged, trainer_of

import hf_lambda_gelu as hlg

pytestmark = pytest.mark.cuda

# SGD without clipping hides no factor; dropout draws other numbers on each device
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "hardness_learning_rate": 5.0}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}


# the layers by name: BERT's own list has the embeddings twice, which torch refuses
FSDP = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}


def learned(trainer: hlg.LambdaGELUTrainer, steps: int) -> list[list[float]]:
    """λ of both sites in the first steps."""
    logs = [logged(trainer, f"hardness/{site}") for site in SITES]
    return [[log[step] for log in logs] for step in range(1, steps + 1)]


@pytest.mark.parametrize("method", ["none", "least_squares"])
def test_a_run(tmp_path: Path, method: str) -> None:
    """Losses, λ and weights are the CPU's, through the switch and to the end."""
    runs = []
    for cpu in (True, False):
        trainer = trainer_of(
            converted(hardness=1.2, **DRY), tmp_path / str(cpu), use_cpu=cpu, hardness_compensate=method, **PLAIN
        )
        trainer.train()
        runs.append(trainer)
    mine, theirs = runs
    assert theirs.model.device.type == "cuda"
    torch.testing.assert_close(learned(theirs, 4), learned(mine, 4), rtol=1e-4, atol=1e-5)
    assert max(abs(value - 1.2) for value in learned(theirs, 4)[-1]) > 1e-3  # it was learned
    assert list(hlg.hardness_profile(theirs.model).values()) == pytest.approx([TARGET] * 2, rel=1e-5)
    for key, wanted in mine.model.state_dict().items():
        torch.testing.assert_close(theirs.model.state_dict()[key].cpu(), wanted, rtol=5e-3, atol=5e-3, msg=key)


def test_bf16(tmp_path: Path) -> None:
    """Under autocast λ is learned in fp32, as near to the fp32 run as bf16 gradients are."""
    runs = []
    for bf16 in (False, True):
        trainer = trainer_of(converted(hardness=1.2, **DRY), tmp_path / str(bf16), use_cpu=False, bf16=bf16, **PLAIN)
        trainer.train()
        runs.append(trainer)
    assert {site.unclipped_hardness.dtype for site in hlg.hardness_sites(runs[1].model).values()} == {torch.float32}
    torch.testing.assert_close(learned(runs[1], 4), learned(runs[0], 4), rtol=5e-2, atol=0)


def test_fsdp_by_accelerate(tmp_path: Path) -> None:
    """FSDP2 on one GPU, set up by accelerate as `TrainingArguments` asks for it: λ is that of the run without."""
    code = f"""
        import json, sys
        sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]!r}
        from pathlib import Path
        from support.training import converted, trainer_of
        import hf_lambda_gelu as hlg

        model = converted(hardness=1.2, **{DRY!r})
        changes = dict(use_cpu=False, fsdp=True, fsdp_config={FSDP!r}, **{PLAIN!r})
        trainer = trainer_of(model, Path({str(tmp_path / "fsdp")!r}), **changes)
        trainer.train()
        kind = type(next(iter(hlg.hardness_sites(trainer.model).values())).unclipped_hardness.data).__name__
        print("RESULT" + json.dumps({{"kind": kind, "history": trainer.state.log_history}}))
    """
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", **port}
    out = in_fresh_process(code, **group)
    found = json.loads(out.split("RESULT")[1].splitlines()[0])
    alone = trainer_of(converted(hardness=1.2, **DRY), tmp_path / "alone", use_cpu=False, **PLAIN)
    alone.train()
    assert found["kind"] == "DTensor"
    for site in SITES:
        values = {entry["step"]: entry[f"hardness/{site}"] for entry in found["history"] if f"hardness/{site}" in entry}
        expected = logged(alone, f"hardness/{site}")
        assert values.keys() == expected.keys()
        assert list(values.values()) == pytest.approx(list(expected.values()), rel=1e-4)
