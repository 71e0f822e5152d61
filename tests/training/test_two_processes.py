"""finetune_text.py on two gloo processes, each with half the batch, against one process with the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from safetensors.torch import load_file
from support.gloo_threads import WORKERS
from support.processes import in_fork
from support.texts import text_model, text_rows, write_csv

import hf_lambda_gelu as hlg
from scripts import finetune_text
from scripts.tools.processes import ROOT

# Runs scripts.finetune_text with an output folder per rank, and writes down what this rank has after training.
PROBE = """
import hashlib, json, os, runpy, sys
from pathlib import Path
import torch
from support.gloo_threads import check_none_is_left, gloo_workers
import hf_lambda_gelu as hlg

torch.set_num_threads(1)
folder, rank, module = Path(sys.argv[1]), os.environ.get("RANK", "0"), sys.argv[2]
train = hlg.LambdaGELUTrainer.train

def probed(trainer, *args, **kwargs):
    output = train(trainer, *args, **kwargs)
    digest = {n: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for n, t in trainer.model.state_dict().items()}
    record = {"log": trainer.state.log_history, "learned": trainer.learned_hardness, "digest": digest}
    record |= {"wrapped": type(trainer.model_wrapped).__name__, "world": trainer.args.world_size}
    record["workers"] = gloo_workers()
    (folder / f"rank{rank}.json").write_text(json.dumps(record))
    return output

hlg.LambdaGELUTrainer.train = probed
if len(sys.argv[3]):
    hlg.verify_relu_pretrained = lambda *_, **__: 0.0  # slow, and done by the run on two processes
sys.argv = [module, *sys.argv[4:], "--output_dir", str(folder / f"out{rank}")]
runpy.run_module(module, run_name="__main__", alter_sys=True)
check_none_is_left()
"""

OPTIONS = "--text_column first --text_pair_column second --num_train_epochs 4 --per_device_eval_batch_size 5"
OPTIONS += " --learning_rate 3e-3 --hardness_learning_rate 0.05 --init_hardness 1.5 --weight_decay 0.1 --logging_steps 1"
OPTIONS += " --eval_strategy epoch --save_strategy epoch --report_to none --disable_tqdm true --use_cpu true --seed 5"
OPTIONS += " --hardness_compensate none --hardness_switch_point 0.25"  # the refit: tests/test_switch.py
OPTIONS += " --sparsity_penalty 0.5"
OPTIONS += " --dataloader_pin_memory false --ddp_find_unused_parameters false"  # raises if λ takes no part in a step


class Run(NamedTuple):
    """The folder of a run, what each rank wrote down, results.json of rank 0, and the options but for the folder."""

    folder: Path
    ranks: list[dict[str, Any]]
    results: dict[str, Any]
    options: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Both runs, at the same time; the optimizer sees 8 of 48 rows a step, 24 steps, the switch after step 6."""
    base = tmp_path_factory.mktemp("distributed")
    probe = base / "probe.py"
    probe.write_text(PROBE)
    model = text_model(base / "bert")
    files = [write_csv(base / f"{name}.csv", text_rows(count, seed)) for name, count, seed in (("a", 48, 0), ("b", 30, 1))]
    options = ["--model_name_or_path", str(model), "--train_file", str(files[0]), "--validation_file", str(files[1])]
    options += OPTIONS.split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]  # port 0: a free one
    two, one = base / "two", base / "one"
    with open(base / "stderr", "w") as errors:
        ours = [*options, "--per_device_train_batch_size", "4"]
        script = [str(probe), str(two), "scripts.finetune_text", "", *ours]
        process = subprocess.Popen([*launcher, *script], env=prepared(two), stdout=subprocess.DEVNULL, stderr=errors)
    try:
        whole = [*options, "--per_device_train_batch_size", "8"]
        done = in_fork(PROBE, str(one), "scripts.finetune_text", "skip", *whole, env=prepared(one))
        assert done.returncode == 0, done.stderr[-3000:]
        assert process.wait(timeout=300) == 0, (base / "stderr").read_text()[-3000:]
    finally:
        process.terminate()  # the launcher passes it on
    return {"two": what_it_left(two, ours), "one": what_it_left(one, whole)}


def prepared(folder: Path) -> dict[str, str]:
    """Makes the folder of a run; the environment of its processes."""
    folder.mkdir()
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }


def what_it_left(folder: Path, options: list[str]) -> Run:
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return Run(folder, ranks, json.loads((folder / "out0" / "results.json").read_text()), options)


def column(record: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in record["log"] if key in entry]


def test_ranks_agree_bit_for_bit(runs: dict[str, Run]) -> None:
    """Each rank wrote down its own λ of every step and a digest of its own weights."""
    first, second = runs["two"].ranks
    assert [(rank["world"], rank["wrapped"]) for rank in (first, second)] == [(2, "DistributedDataParallel")] * 2
    assert first["digest"] == second["digest"]
    assert first["learned"] == second["learned"]
    for key in (f"hardness/{site}" for site in first["learned"]):
        values = column(first, key)
        assert values == column(second, key)
        assert len(values) == 24
        assert len({*values}) > 20  # learned, then ramped: every step another


def test_processes_end_without_the_threads_of_their_group(runs: dict[str, Run]) -> None:
    """There were some; each process looked for them after the script's last line, and would have failed."""
    assert [rank["workers"] for rank in runs["two"].ranks] == [WORKERS] * 2
    assert runs["one"].ranks[0]["workers"] == 0


def test_two_processes_are_one_with_the_batch_of_both(runs: dict[str, Run]) -> None:
    """λ, losses and gradient norms of every step, weights and metrics, to the rounding of a sum in another order."""
    two, one = runs["two"].ranks[0], runs["one"].ranks[0]
    assert one["world"] == 1
    sites = list(one["learned"])
    assert any(abs(value - 1.5) > 0.1 for value in one["learned"].values())
    for key in (
        "loss",
        "grad_norm",
        "learning_rate",
        "eval_loss",
        "eval_relu_loss",
        *(f"hardness/{site}" for site in sites),
    ):
        assert len(column(one, key)) in (4, 24)
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-5), key
    assert two["learned"] == pytest.approx(one["learned"], rel=1e-5)
    assert column(two, f"hardness/{sites[0]}")[-1] == pytest.approx(159.5769, abs=1e-3)
    for stage, metrics in runs["one"].results["metrics"].items():
        assert runs["two"].results["metrics"][stage] == pytest.approx(metrics, rel=1e-5)
    assert runs["two"].results["stock_difference"] <= 1e-6
    weights = [load_file(runs[name].folder / "out0" / "relu" / "model.safetensors") for name in ("two", "one")]
    for name, value in weights[1].items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which Adam's normalisation blows up
            torch.testing.assert_close(weights[0][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_only_the_first_process_writes(runs: dict[str, Run]) -> None:
    """Each rank was given a folder of its own: of the second there is only its random state, in each checkpoint."""
    files = {
        str(path.relative_to(runs["two"].folder)) for path in (runs["two"].folder / "out1").rglob("*") if path.is_file()
    }
    assert files == {f"out1/checkpoint-{step}/rng_state_1.pth" for step in (6, 12, 18, 24)}
    written = runs["two"].folder / "out0"
    for name in ("results.json", "hardness.png", "relu/model.safetensors", "checkpoint-12/model.safetensors"):
        assert (written / name).is_file(), name


def test_one_process_continues_the_run_of_two(runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint in mid-ramp, by the script's own option, to the same losses and λ."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hlg, "verify_relu_pretrained", lambda *_, **__: 0.0)
    checkpoint = runs["two"].folder / "out0" / "checkpoint-12"
    more = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint)]
    results = finetune_text.main([*runs["one"].options, *more])
    assert results["learned_hardness"] == pytest.approx(runs["two"].results["learned_hardness"], rel=1e-6)
    state = json.loads((tmp_path / "out" / "checkpoint-24" / "trainer_state.json").read_text())
    for key in ("loss", *(f"hardness/{site}" for site in results["learned_hardness"])):
        continued = [entry[key] for entry in state["log_history"] if key in entry]
        assert continued == pytest.approx(column(runs["two"].ranks[0], key), rel=1e-5), key
