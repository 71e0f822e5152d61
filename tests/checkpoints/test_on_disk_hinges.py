"""Checkpoints whose layers get wider in their files: what memory makes, to the bit, with one block of weights at a time."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.folders import digests, load, read, same_tensors, stored
from support.other_layers import OTHER_LAYERS, other_inputs, smooth_layers
from support.processes import killed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import disk_room, on_disk_files
from hf_lambda_gelu.structure.block_source import blocks_of
from hf_lambda_gelu.structure.file_source import FileSource
from hf_lambda_gelu.surgery.hinges import work
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.refit_files import RefitFiles
from hf_lambda_gelu.surgery.refit.store import Store

REFIT: dict[str, Any] = {"compensate": "least_squares"}
# a gated FFN that gets biases, with and without data; a head that keeps one ReLU; images; Conv1D and λ; a shared block;
# gate and up in one map, which gets a bias, or has one; 1×1 convolutions
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**REFIT, "budget": 1.5}),
    "bert": ("bert", {**REFIT, "hinges": 2}),
    "vit": ("vit", {**REFIT, "hinges": 2}),
    "gpt2": ("gpt2", {**REFIT, "hinges": 2}),
    "albert": ("albert", {**REFIT, "hinges": 2}),
    "llama without data": ("llama", {"hinges": 4}),
    "gpt2 without data": ("gpt2", {"hinges": 5}),
    "modernbert": ("modernbert", {**REFIT, "budget": 1.5}),
    "modernbert without data": ("modernbert", {"hinges": 4}),
    "moonshine": ("moonshine", {**REFIT, "hinges": 2}),
    "poolformer": ("poolformer", {**REFIT, "hinges": 2}),
    "poolformer without data": ("poolformer", {"hinges": 4}),
}


def build(name: str, **config: Any) -> Any:
    if name in OTHER_LAYERS:
        return smooth_layers(name, **config)
    return tiny.build(name, **({"n_inner": 37} if name == "gpt2" else {}), **config)


def batches(name: str) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(5):  # 110 tokens for 74 units
        made.append(other_inputs(name, seed) if name in OTHER_LAYERS else tiny.inputs(build(name), seed))
    return made


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing takes longer than all else


@pytest.mark.parametrize("case", CASES)
def test_is_what_memory_makes(case: str, tmp_path: Path) -> None:
    """Tensors to the bit, config with its widths, report and index; the folder loads; the source is as it was."""
    name, options = CASES[case]
    model = build(name)
    if name == "gpt2":
        hlg.convert(model, 3.0)
    model.save_pretrained(tmp_path / "src", max_shard_size="20KB")
    before = digests(tmp_path / "src")
    if "compensate" in options:
        options = {**options, "calibration": batches(name)}
    report = hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **options)
    assert digests(tmp_path / "src") == before
    memory = load(type(model), tmp_path / "src")
    if name != "gpt2":
        hlg.convert(memory)
    expected = hlg.relu_ize(memory, **options)
    assert expected.hinges is not None
    hlg.save_relu_pretrained(memory, tmp_path / "memory")
    same_tensors(stored(tmp_path / "dst"), stored(tmp_path / "memory"))
    assert read(tmp_path / "dst") == read(tmp_path / "memory")
    assert report.model.hinges == expected.hinges
    assert str(report.model.hinges) == str(expected.hinges)
    same_tensors(load(type(model), tmp_path / "dst").state_dict(), memory.state_dict())
    index = read(tmp_path / "dst", "model.safetensors.index.json")["metadata"]
    sizes = [tensor.nbytes for tensor in stored(tmp_path / "dst").values()]
    assert index == {"total_parameters": memory.num_parameters(), "total_size": sum(sizes)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "memory", "src"]


# ---------------------------------------------------------------------------------------------------------- after a kill

# (the model, what the process is killed in, at which call, blocks of three that are done by then)
MOMENTS: list[tuple[str, Any, str, int, int]] = [
    ("llama", work, "place", 2, 1),  # one block is wider and refit, the next is measured
    ("gpt2", engine, "decide", 2, 1),  # the second one is wider, and not refit
    ("gpt2", RefitFiles, "note", 3, 2),  # two are noted, the third is refit
    ("modernbert", engine, "decide", 2, 1),
    ("llama", on_disk_files, "write_changed", 2, 3),
]


def deep(root: Path, name: str, **options: Any) -> hlg.CheckpointReport:
    options = options or {"hinges": 2}
    return hlg.relu_ize_checkpoint(root / name, root / "dst", calibration=batches(name), **REFIT, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, hlg.CheckpointReport]]:
    """Sources of three blocks, and what uninterrupted runs make of them."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        for name, blocks in (("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("modernbert", "num_hidden_layers")):
            root = tmp_path_factory.mktemp("whole")
            build(name, **{blocks: 3}).save_pretrained(root / name, max_shard_size="20KB")
            found[name] = root, deep(root, name)
    return found


@pytest.mark.parametrize(("name", "owner", "attribute", "call", "done"), MOMENTS)
def test_a_kill(
    name: str,
    owner: Any,
    attribute: str,
    call: int,
    done: int,
    whole: dict[str, tuple[Path, hlg.CheckpointReport]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same call goes on at the block that was being worked on, and ends with the same bits and the same report."""
    root, expected = whole[name]
    shutil.copytree(root / name, tmp_path / name)
    killed(owner, attribute, call, lambda: deep(tmp_path, name))
    assert not (tmp_path / "dst").exists()
    placed: list[None] = []
    place = work.place
    monkeypatch.setattr(work, "place", lambda *args, **kwargs: placed.append(None) or place(*args, **kwargs))
    report = deep(tmp_path, name)
    assert len(placed) == 3 - done
    same_tensors(stored(tmp_path / "dst"), stored(root / "dst"))
    assert read(tmp_path / "dst") == read(root / "dst")
    assert report.model.hinges == expected.model.hinges
    assert report.model.compensation.sites == expected.model.compensation.sites
    assert report.model.relative_change == expected.model.relative_change
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dst", name])


def test_another_width_is_refused(whole: dict[str, tuple[Path, hlg.CheckpointReport]], tmp_path: Path) -> None:
    """What a killed process has done at another width is neither used nor lost."""
    shutil.copytree(whole["llama"][0] / "llama", tmp_path / "llama")
    killed(RefitFiles, "note", 3, lambda: deep(tmp_path, "llama"))
    left = digests(tmp_path)
    with pytest.raises(hlg.CheckpointError, match=r"holds 2 blocks .*, begun with other hinges, budget: pass what it was"):
        deep(tmp_path, "llama", budget=1.5)
    assert digests(tmp_path) == left


def test_a_kill_without_data(tmp_path: Path) -> None:
    """Nothing of it is used, nor stays."""
    build("llama").save_pretrained(tmp_path / "src")

    def widen(name: str) -> None:
        hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / name, hinges=4)

    widen("whole")
    killed(RefitFiles, "_write", 5, lambda: widen("dst"))
    assert len(list((tmp_path / ".dst.hf_lambda_gelu-unfinished").glob("*.bin"))) == 4
    widen("dst")
    same_tensors(stored(tmp_path / "dst"), stored(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src", "whole"]


# ----------------------------------------------------------------------------------------------------- memory and disks


@pytest.mark.parametrize("options", [{**REFIT, "hinges": 2}, {"hinges": 4}])
def test_one_block_at_a_time(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are planned, measured and made wider too: when a block is read, nothing holds what was read before."""
    build("llama", num_hidden_layers=4).save_pretrained(tmp_path / "src", max_shard_size="20KB")
    memory: list[StorageWeakRef] = []
    alive, within = list[int](), list[int]()
    load_all = FileSource.load_all

    def watched(source: FileSource, resting: Any) -> Any:
        if resting:
            alive.append(sum(not storage.expired() for storage in memory))
        loaded = load_all(source, resting)
        streamed = [[source.rests(p.data) for p in b.parameters() if source.streams(p)] for b in blocks_of(source.model)]
        within.append(sum(not all(rests) for rests in streamed))
        if any(streamed):  # what lies outside of blocks is there by then
            memory.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in loaded)
        return loaded

    monkeypatch.setattr(FileSource, "load_all", watched)
    if "compensate" in options:
        options = {**options, "calibration": batches("llama")}
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **options)
    assert len(memory) > 4 * 9 * 5
    assert max(alive) == 0
    assert max(within[1:]) <= 1


def numbers_in(error: pytest.ExceptionInfo[hlg.CheckpointError]) -> int:
    """The bytes that an error says are needed."""
    return int(str(error.value).split("need up to ")[1].split(" bytes")[0].replace(",", ""))


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for before the first block is refit, for wider weights too, is what then lies on the disk at most."""
    build("llama", vocab_size=8, num_hidden_layers=3).save_pretrained(tmp_path / "src", max_shard_size="20KB")
    for batch in (data := batches("llama")):
        batch["input_ids"] %= 8
    own = {path.stat().st_ino for path in (tmp_path / "src").iterdir()}
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    peak, free, widened = [0], [0], list[None]()

    def refit() -> object:
        return hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=data, hinges=2, **REFIT)

    def looked_at(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def looking(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            files = [path.stat() for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".state")]
            peak[0] = max(peak[0], sum(file.st_size for file in files if file.st_ino not in own))
            return found

        monkeypatch.setattr(owner, name, looking)

    for owner, name in ((Store, "put"), (RefitFiles, "_write"), (RefitFiles, "_copied"), (on_disk_files, "save_file")):
        looked_at(owner, name)
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda _: type("usage", (), {"free": free[0]}))
    place = work.place
    monkeypatch.setattr(work, "place", lambda *args, **kwargs: widened.append(None) or place(*args, **kwargs))
    with pytest.raises(hlg.CheckpointError, match="hidden states of 110 tokens and new weight files need up to") as early:
        refit()
    free[0] = numbers_in(early)  # without what gets wider, which a run of the model shows
    with pytest.raises(hlg.CheckpointError, match=r"where [\d,]+ are free\. Make room") as late:
        refit()
    free[0] = numbers_in(late) - 1
    with pytest.raises(hlg.CheckpointError, match="need up to"):
        refit()
    assert not widened
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "tmp"]
    free[0] += 1
    refit()
    assert len(widened) == 3
    assert 0.9 * free[0] < peak[0] <= free[0]


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("llama", {"hinges": 0}, ValueError, "hinges must be from 1"),
        ("llama", {"hinges": 2.0}, TypeError, "hinges must be an integer"),
        ("llama", {"hinges": 2}, ValueError, "without data 2 hinges"),
        ("llama", {"budget": 0.5, **REFIT}, ValueError, "budget must be a finite number from 1"),
        ("llama", {"budget": 1.5}, ValueError, "is spent where the data say"),
        ("llama", {"hinges": 3, **REFIT}, hlg.CalibrationError, "wants 111 at least, as 11 examples in place of 10 would"),
        ("t5", {"hinges": 2, **REFIT}, hlg.HingeError, "has no bias, and no config attribute gives it one"),
        ("t5", {"hinges": 4}, hlg.HingeError, "has no bias, and no config attribute gives it one"),
        ("dinov2", {"budget": 1.25, **REFIT}, hlg.HingeError, r"a budget of 1\.25 cannot be said: 1 and 1\.5 can"),
    ],
)
def test_refused(
    name: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in memory, before a weight was written; numbers before the calibration set is read."""
    build(name).save_pretrained(tmp_path / "src")
    monkeypatch.setattr(RefitFiles, "_write", lambda *_: pytest.fail("a weight was written"))
    numbers = error in (ValueError, TypeError)
    if "compensate" in options:
        options = {**options, "calibration": unread() if numbers else batches(name)}
    with pytest.raises(error, match=message):
        hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def unread() -> Iterator[Any]:
    raise AssertionError("the calibration set was read")
    yield


@pytest.mark.parametrize("how", ["touched", "cut short"])
def test_a_checkpoint_that_changes(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its second block gets wider: the error names the file, and neither folder nor work stays."""
    build("llama").save_pretrained(tmp_path / "src", max_shard_size="20KB")
    name = read(tmp_path / "src", "model.safetensors.index.json")["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    place, calls = work.place, list[None]()

    def changing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            data = (tmp_path / "src" / name).read_bytes()
            (tmp_path / "src" / name).write_bytes(data[:-8000] if how == "cut short" else data)
        return place(*args, **kwargs)

    monkeypatch.setattr(work, "place", changing)
    with pytest.raises(hlg.CheckpointError, match=f"{name}' has changed since the work began"):
        hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=batches("llama"), hinges=2, **REFIT)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
