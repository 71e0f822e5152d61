"""Verbs are transactions: what was raised, wherever, leaves model, process and disk as they were; threads do not meet."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import module_in_fork
from torch import nn
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.folders import whole_folder
from hf_lambda_gelu.structure import config_probe
from hf_lambda_gelu.structure.transaction import keep, transaction
from scripts.tools.fingerprint import fingerprint
from scripts.tools.injection import RESULTS
from scripts.tools.injection_cases import MODELS, VERBS, batches
from scripts.tools.tables import read


def _converted(name: str) -> nn.Module:
    model = MODELS[name]()
    hlg.convert(model, init_hardness=4.0)
    return model


def test_a_sample_of_all_stops(tmp_path: Path) -> None:
    """Five verbs, stopped at every 1201st call: `python -m scripts.tools.injection` stops all of them at each."""
    verbs = ["convert", "relu_ize least_squares", "fold", "calibrate", "audit"]
    out = tmp_path / "rows.csv"
    options = ["--verbs", *verbs, "--models", "shared", "--every", "1201", "--offset", "7", "--out", str(out)]
    done = module_in_fork("scripts.tools.injection", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(verbs)
    assert all(" 0 changed of " in line for line in lines)
    assert sum(int(line.split(" changed of ")[1].split()[0]) for line in lines) > 15


# verb that is stopped at a part of its calls → each how many
_SAMPLED = {"relu_ize hinges": "41", "relu_ize hinges without data": "41", "relu_ize_checkpoint hinges": "211"}


def test_table_of_the_stops_that_were_tried() -> None:
    """Each row is a verb on a model: all verbs on all models that they take, at every call; wider layers at each 41st."""
    rows = read(RESULTS)
    wanted = [(name, model) for name, verb in VERBS.items() for model in MODELS if model not in verb.skips]
    assert [(row["verb"], row["model"]) for row in rows] == wanted
    assert sum(int(row["tried"]) for row in rows) > 450_000
    for row in rows:
        assert row["every"] == _SAMPLED.get(row["verb"], "1")
        assert abs(int(row["tried"]) - int(row["points"]) / int(row["every"])) < 1
        assert int(row["tried"]) == int(row["raised"]) + int(row["absorbed"])
        assert (row["changed"], row["first"]) == ("0", "")


def test_what_a_failing_verb_changed_is_put_back(tmp_path: Path) -> None:
    """Each kind of change, made by a verb that then fails; a parameter's data both written into and bound anew."""
    model = MODELS["bert"]()
    bound, written = model.classifier.weight, model.classifier.bias
    alias = model.state_dict()
    values = {name: value.clone() for name, value in alias.items()}

    @transaction
    def spoil(model: nn.Module) -> None:
        bound.data = torch.zeros(3)
        keep(written)
        written.data.fill_(7.0)
        model.config.hidden_act = "relu"
        model.config.id2label[5] = "new"
        model.bert.config = None
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
        model.bert.embeddings.position_ids.add_(1)
        model.register_forward_hook(lambda *a: None)
        model.eval().requires_grad_(False)
        model.classifier.register_parameter("more", nn.Parameter(torch.ones(1)))
        bound.grad = torch.ones_like(bound)
        ACT2FN["left"] = nn.ReLU
        torch.manual_seed(5)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.device("meta").__enter__()
        torch.autocast("cpu", torch.bfloat16).__enter__()
        torch.compiler.set_stance("force_eager")
        raise KeyboardInterrupt

    before = fingerprint(model, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        spoil(model)
    assert fingerprint(model, tmp_path) == before
    assert all(torch.equal(alias[name], values[name]) for name in values)


@pytest.mark.parametrize("within", ["caught", "raised"])
def test_a_verb_within_a_verb(within: str, tmp_path: Path) -> None:
    """What an inner verb did is undone where the outer one fails later, and only the inner where its error is caught."""
    model = _converted("shared")
    before, x = fingerprint(model, tmp_path), batches(model)[0]

    @transaction
    def inner(model: nn.Module) -> None:
        keep(model.last["in"].weight)
        model.last["in"].weight.data.zero_()
        raise MemoryError

    @transaction
    def outer(model: nn.Module) -> None:
        if within == "caught":
            with pytest.raises(MemoryError):
                inner(model)
            assert fingerprint(model, tmp_path) == before
            return
        hlg.fold(model, x)
        assert not hlg.hardness_sites(model)
        raise OSError("outer")

    if within == "raised":
        with pytest.raises(OSError, match="outer"):
            outer(model)
    else:
        outer(model)
    assert fingerprint(model, tmp_path) == before


@pytest.mark.parametrize("name", ["shared", "llama"])
@pytest.mark.parametrize("outcome", ["done", "failed"])
def test_aliases_of_weights(name: str, outcome: str) -> None:
    """A state_dict and shared memory see the weights of before while and after a failed refit, and else the refit ones."""
    model = _converted(name).eval().share_memory()
    alias = model.state_dict()
    values, places = ({n: f(t) for n, t in alias.items()} for f in (torch.Tensor.clone, torch.Tensor.data_ptr))

    def stop(prediction: object) -> dict[str, float]:
        raise ValueError("stopped")

    labelled = [dict(b, labels=b["input_ids"]) if isinstance(b, dict) else b for b in batches(model)]
    if outcome == "failed" and name == "shared":
        handle = model.last["out"].register_forward_pre_hook(_Stop(12))
    options: dict[str, Any] = {"compute_metrics": stop} if outcome == "failed" and name == "llama" else {}
    if outcome == "failed":
        with pytest.raises((ValueError, KeyboardInterrupt)):
            hlg.relu_ize(model, calibration=labelled, compensate="least_squares", **options)
        if name == "shared":
            handle.remove()
        assert all(torch.equal(alias[n], v) for n, v in values.items())
    else:
        hlg.relu_ize(model, calibration=labelled, compensate="least_squares")
        assert any(not torch.equal(alias[n], v) for n, v in values.items())
    now = model.state_dict()
    old = [n for n in now if n in values]
    assert all(torch.equal(now[n], alias[n]) and now[n].data_ptr() == places[n] for n in old)
    assert all(parameter.is_shared() for n, parameter in model.named_parameters() if n in old)


class _Stop:
    """A forward hook that raises KeyboardInterrupt at the call of that number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *args: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_fold_that_is_stopped(at: int, tmp_path: Path) -> None:
    model = _converted("shared").eval()
    handle = model.register_forward_hook(_Stop(at))
    before = fingerprint(model, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        hlg.fold(model, batches(model)[0])
    assert fingerprint(model, tmp_path) == before
    handle.remove()


def test_only_that_raises_late(tmp_path: Path) -> None:
    model, asked = MODELS["shared"](), []

    def only(name: str, module: nn.Module) -> bool:
        asked.append(name)
        if name == "second.1":
            raise KeyboardInterrupt
        return True

    before = fingerprint(model, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        hlg.convert(model, only=only)
    assert "first.1" in asked  # it had been converted by then
    assert fingerprint(model, tmp_path) == before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_scratch_that_cannot_be_removed(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The refit stays, with a warning that names the folder; where the user stops there, all is as it was."""
    model, remove = _converted("shared"), shutil.rmtree
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise error(16, "busy")
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", busy)
    monkeypatch.setattr("hf_lambda_gelu.structure.scratch.logger.warning", lambda text: said.append(text))
    said: list[str] = []
    before = fingerprint(model, tmp_path)
    if error is OSError:
        hlg.relu_ize(model, calibration=batches(model), compensate="least_squares")
        assert not hlg.hardness_sites(model)
        assert [path.name in said[0] for path in tmp_path.iterdir()] == [True]
    else:
        with pytest.raises(KeyboardInterrupt):
            hlg.relu_ize(model, calibration=batches(model), compensate="least_squares")
        assert fingerprint(model, tmp_path) == before


def test_threads_get_what_they_get_alone() -> None:
    """Convert, refit and audit, four models in four threads: the same weights and reports as one after the other."""

    def work(model: nn.Module) -> tuple[Any, ...]:
        sites = [site.name for site in hlg.convert(model, init_hardness=4.0).sites]
        report = hlg.relu_ize(model, calibration=batches(model), compensate="least_squares")
        assert report.compensation is not None
        kinds = hlg.audit(model, batches(model)[0]).counts
        sums = {n: float(t.double().sum()) for n, t in model.state_dict().items()}
        return sites, [s.method for s in report.compensation.sites], dict(report.folded), kinds, sums

    names = ["bert", "llama", "bert", "shared"]
    alone = [work(MODELS[name]()) for name in names]
    models = [MODELS[name]() for name in names]  # not in the threads: `torch.manual_seed` is the whole process's
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, models))
    finally:
        sys.setswitchinterval(before)
    assert together == alone


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_a_probe_that_fails_is_no_answer(error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither "governs nothing", nor "hard-coded, so fold it"."""
    model = _converted("bert")
    before = fingerprint(model, tmp_path)

    def fail(model: nn.Module, path: str) -> None:
        raise error("no room")

    monkeypatch.setattr(config_probe, "_probed", fail)
    with pytest.raises(error):
        hlg.relu_ize(model, force=True)
    assert fingerprint(model, tmp_path) == before
    monkeypatch.setattr(config_probe, "_probed", lambda model, path: (_ for _ in ()).throw(KeyError("other")))
    with pytest.raises(RuntimeError, match=r"config\.hidden_act = 'lambda_gelu'.*cannot be found out"):
        hlg.relu_ize(model, force=True)
    assert fingerprint(model, tmp_path) == before


def test_a_folder_has_the_mode_of_new_ones_and_umask_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "like").mkdir()

    def touched(mask: int) -> int:
        raise AssertionError("the umask belongs to all threads")

    monkeypatch.setattr(os, "umask", touched)
    with whole_folder(tmp_path / "made") as folder:
        (folder / "file").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("made", "like")]
    assert modes[0] == modes[1]
