"""Checkpoints refit in their files: what memory makes, to the bit, with one block of weights at a time."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support import tiny
from support.folders import LEAF, digests, inodes, load, read, same_tensors, stored
from support.stock import stock_outputs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import MixtralConfig, MixtralForCausalLM, MobileViTConfig, MobileViTModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import disk_room
from hf_lambda_gelu.checkpoints.on_disk_files import Source
from hf_lambda_gelu.checkpoints.streamed_model import Streamed
from hf_lambda_gelu.structure import file_source
from hf_lambda_gelu.structure.block_source import blocks_of, source_of
from hf_lambda_gelu.structure.file_source import FileSource
from hf_lambda_gelu.surgery.refit import chain_walk, refit_files, store

# a gated FFN without biases, a head outside of the blocks, images, Conv1D, two towers, one block that runs several times
NAMES = ["llama", "bert", "vit", "gpt2", "t5", "albert"]


def batches(name: str) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(12):
        made.append(tiny.inputs(tiny.build(name), seed))
    return made


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing takes longer than all else


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Refit in files and in memory; all that was made in files loaded and run in one stock process."""
    root, found = tmp_path_factory.mktemp("refit"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        for name in NAMES:
            model = tiny.build(name)
            if name == "gpt2":  # of a λ-GELU checkpoint, and λ stays behind
                hlg.convert(model, 3.0)
            model.save_pretrained(root / "src" / name, max_shard_size="20KB")
            before = digests(root / "src" / name)
            report = hlg.relu_ize_checkpoint(
                root / "src" / name, root / name, calibration=batches(name), compensate="least_squares"
            )
            assert digests(root / "src" / name) == before
            memory = load(type(model), root / "src" / name)
            if name != "gpt2":
                hlg.convert(memory)
            expected = hlg.relu_ize(memory, calibration=batches(name), compensate="least_squares")
            hlg.save_relu_pretrained(memory, root / "memory" / name)
            found[name] = (memory, report, expected, tiny.inputs(model))
    stock = stock_outputs({name: (type(m).__name__, batch) for name, (m, _, _, batch) in found.items()}, root)
    return root, {name: (*entry, stock[name]) for name, entry in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_is_what_memory_makes(name: str, made: tuple[Path, dict[str, Any]]) -> None:
    """Tensors to the bit, config and report; a stock process computes the same; shards without refit weights are links."""
    root, found = made
    memory, report, expected, batch, stock = found[name]
    same_tensors(stored(root / name), stored(root / "memory" / name))
    assert read(root / name) == read(root / "memory" / name)
    assert LEAF not in str(list(stored(root / name)))
    assert {**vars(report.model), "compensation": None} == {**vars(expected), "compensation": None}
    assert report.model.compensation.sites == expected.compensation.sites
    assert any(site.method == "least_squares" for site in expected.compensation.sites)
    assert report.model.compensation.uncompensated == expected.compensation.uncompensated
    assert report.model.compensation.bias_attribute == expected.compensation.bias_attribute
    assert tiny.relative_difference(tiny.outputs(memory, batch), stock) == 0.0
    assert report.linked
    assert report.rewritten
    assert len(inodes(root / name) & inodes(root / "src" / name)) == len(report.linked)
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("compensate", ["bias", None])
def test_other_ways(compensate: Any, tmp_path: Path) -> None:
    """A bias alone; and no refit, but measured."""
    model = tiny.build("vit")
    model.save_pretrained(tmp_path / "src")
    options = {"calibration": batches("vit"), "compensate": compensate, "force": compensate is None}
    report = hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", **options)
    memory = load(type(model), tmp_path / "src")
    hlg.convert(memory)
    expected = hlg.relu_ize(memory, **options)
    same_tensors(load(type(model), tmp_path / "dst").state_dict(), memory.state_dict())
    assert report.model.relative_change == expected.relative_change > 0.0
    assert report.model.zeros == expected.zeros


def test_convolutions_whose_biases_are_their_norms(tmp_path: Path) -> None:
    """Batch norms lend their biases, in files as in memory."""
    torch.manual_seed(0)
    neck = [4, 4, 8, 8, 8, 16, 16]
    model = MobileViTModel(
        MobileViTConfig(
            image_size=32, hidden_sizes=[8, 12, 16], neck_hidden_sizes=neck, expand_ratio=2.0, num_attention_heads=2
        )
    )
    pictures = [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(5)]
    with torch.no_grad():
        model.train()(**pictures[0])  # the norms get numbers
        for parameter in model.eval().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "src")
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=pictures, compensate="least_squares").compensation
    assert report is not None
    assert sum("weights only" in site.note for site in report.sites) < 0.2 * len(report.sites)
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=pictures, compensate="least_squares")
    same_tensors(stored(tmp_path / "dst"), dict(model.state_dict()))


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model runs, no other block's weights are in memory than those of the one that runs or is worked on."""
    model = tiny.build("llama", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "src", max_shard_size="20KB")
    seen: list[int] = []
    load_all = FileSource.load_all

    def counted(source: FileSource, resting: Any) -> Any:
        loaded = load_all(source, resting)
        within = [
            sum(not source.rests(p.data) for p in b.parameters() if source.streams(p)) for b in blocks_of(source.model)
        ]
        seen.append(sum(count > 0 for count in within))
        return loaded

    monkeypatch.setattr(FileSource, "load_all", counted)
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=batches("llama"), compensate="least_squares")
    assert len(seen) > 4 * len(batches("llama"))
    assert max(seen[1:]) <= 1  # beside the one that is being read


def test_nothing_keeps_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is read, the memory of what was read before is free: no graph, no hook and no list holds it."""
    tiny.build("llama", num_hidden_layers=4).save_pretrained(tmp_path / "src", max_shard_size="20KB")
    memory: list[StorageWeakRef] = []
    alive: list[int] = []
    load_all = FileSource.load_all

    def watched(source: FileSource, resting: Any) -> Any:
        if resting:  # else the block is held, as it is worked on
            alive.append(sum(not storage.expired() for storage in memory))
        loaded = load_all(source, resting)
        if any(source.streams(p) for p in source.model.parameters()):  # what lies outside of blocks is there by then
            memory.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in loaded)
        return loaded

    monkeypatch.setattr(FileSource, "load_all", watched)
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=batches("llama"), compensate="least_squares")
    assert len(memory) > 4 * 9 * len(batches("llama"))
    assert max(alive) == 0


def test_skipped_blocks_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that shows what blocks get, and runs none, reads no weights; the same blocks are read where they run."""
    tiny.build("llama", num_hidden_layers=4).save_pretrained(tmp_path / "src", max_shard_size="20KB")
    read_in: dict[str, list[int]] = {"skipping": [], "running": []}
    reads: list[None] = []
    load_all = FileSource.load_all

    def watched(source: FileSource, resting: Any) -> Any:
        reads.extend([None] * bool(resting))
        return load_all(source, resting)

    def counted(function: Any, where: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            count = len(reads)
            result = function(*args, **kwargs)
            read_in[where].append(len(reads) - count)
            return result

        return run

    monkeypatch.setattr(FileSource, "load_all", watched)
    monkeypatch.setattr(chain_walk, "capture_skipping", counted(chain_walk.capture_skipping, "skipping"))
    monkeypatch.setattr(chain_walk, "capture", counted(chain_walk.capture, "running"))
    hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=batches("llama"), compensate="least_squares")
    assert read_in == {"skipping": [0] * len(batches("llama")), "running": [4, 4]}


def test_weights_come_and_go(tmp_path: Path) -> None:
    """A block's weights rest in their file but while it runs, also after an error in it; a large head comes and goes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_source, "_LARGE", 1000)
        tiny.build("llama").save_pretrained(tmp_path / "src")
        streamed = Streamed(Source(tmp_path / "src", tmp_path / "dst"), torch.device("cpu"))
        model, source = streamed.model, streamed.source
        block = model.model.layers[0]
        with source.attached(), torch.no_grad():
            assert source_of(model) is source
            seen: list[bool] = []
            block.mlp.register_forward_hook(lambda *_: seen.append(source.rests(block.mlp.down_proj.weight.data)))
            out = model(**batches("llama")[0]).logits
            assert seen == [False]
            assert source.streams(model.lm_head.weight)
            assert all(source.rests(p.data) for p in model.parameters() if source.streams(p))
            assert sum(source.streams(p) for p in block.parameters()) == 9  # without λ
            with pytest.raises(TypeError):
                block(*[object()] * 50)
            assert source.rests(block.mlp.down_proj.weight.data)
        assert source_of(model) is None
    memory = load(type(model), tmp_path / "src")
    hlg.convert(memory)
    assert torch.equal(out, memory(**batches("llama")[0]).logits)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.fixture
def src(tmp_path: Path) -> Path:
    tiny.build("llama").save_pretrained(tmp_path / "src", max_shard_size="20KB")
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensate": "least_squares"}, "learns from data: pass calibration"),
        ({"compensate": "bogus", "calibration": [{}]}, "unknown compensate='bogus'"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used here"),
        ({"device": "meta"}, "device='meta': weights are streamed to 'cpu' or 'cuda' alone"),
        ({"calibration": [], "compensate": "least_squares"}, "yielded no batch"),
        ({"calibration": [{"other": torch.ones(1)}], "compensate": "least_squares"}, "no tensor in it is an input of"),
        ({"calibration": [{"input_ids": torch.ones(2, 3)}], "compensate": "least_squares"}, "calibration batch 0: "),
        ({"calibration": [{"input_ids": torch.ones(2, 3).long()}]}, "2 of 2 gates are soft"),
    ],
)
def test_bad_options(src: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    before = digests(tmp_path)
    with pytest.raises((ValueError, hlg.SoftGateError), match=message):
        hlg.relu_ize_checkpoint(src, tmp_path / "dst", **options)
    assert digests(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_target_that_is_there(src: Path, tmp_path: Path) -> None:
    """Before the calibration set is read; with overwrite a saved model goes, but is there until the end."""

    def unread() -> Iterator[Any]:
        raise AssertionError("the calibration set was read")
        yield

    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists and is not empty: choose another folder, or pass overwrite=True"):
        hlg.relu_ize_checkpoint(src, tmp_path / "dst", calibration=unread(), compensate="least_squares")
    hlg.relu_ize_checkpoint(src, tmp_path / "dst", calibration=batches("llama"), compensate="bias", overwrite=True)
    assert read(tmp_path / "dst")["hidden_act"] == "relu"


def test_experts_are_refused(tmp_path: Path) -> None:
    """A checkpoint that holds each expert by itself: what memory has is merged."""
    MixtralForCausalLM(MixtralConfig(**tiny.GATED, num_local_experts=4)).save_pretrained(tmp_path / "src")
    with pytest.raises(hlg.CheckpointError, match="in another form or dtype than MixtralForCausalLM has it"):
        hlg.relu_ize_checkpoint(tmp_path / "src", tmp_path / "dst", calibration=batches("llama"), compensate="bias")


@pytest.mark.parametrize("how", ["touched", "cut short", "replaced", "gone"])
def test_a_checkpoint_that_changes(how: str, src: Path, tmp_path: Path) -> None:
    path = sorted(src.glob("*.safetensors"))[1]

    def changing() -> Iterator[dict[str, Tensor]]:
        yield from batches("llama")
        data = path.read_bytes()
        if how in ("replaced", "gone"):
            path.unlink()
        if how == "cut short":
            path.write_bytes(data[:-4000])
        elif how != "gone":
            path.write_bytes(data)

    with pytest.raises(hlg.CheckpointError, match=f"{path.name}' has changed since the work began"):
        hlg.relu_ize_checkpoint(src, tmp_path / "dst", calibration=changing(), compensate="least_squares")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("where", ["weights", "states"])
def test_a_full_disk(where: str, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where refit weights are written, or hidden states, whose library words it in its own way."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_too(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(*((refit_files.os, "fsync", full) if where == "weights" else (store, "save_file", full_too)))
    with pytest.raises(hlg.CheckpointError, match="no room is left for hidden states in"):
        hlg.relu_ize_checkpoint(src, tmp_path / "dst", calibration=batches("llama"), compensate="least_squares")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_no_room(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before the model has run: 4 hidden states of 32 fp32 numbers for each of 66 tokens and what a map gets, or
    the new files that come after them, and 2 states for whoever goes on after a kill. Once the maps are known: those of
    both blocks, refit, and biases for all of them in the files."""
    tokens = sum(batch["input_ids"].numel() for batch in batches("llama"))
    hidden, inner = 32, 37
    files = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    states, kept = (4 * hidden + inner) * tokens * 4, 2 * hidden * tokens * 4
    early = kept + max(states, files)
    biases = 2 * (2 * inner + hidden) * 4
    late = kept + 2 * (hidden * inner + hidden) * 4 + max(states, files + biases)
    room = [0]
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda _: type("usage", (), {"free": room[0]}))
    monkeypatch.setattr(disk_room.tempfile, "gettempdir", lambda: str(tmp_path))

    def refit() -> object:
        return hlg.relu_ize_checkpoint(src, tmp_path / "dst", calibration=batches("llama"), compensate="bias")

    for size in (early, late):
        room[0] = size - 1
        message = f"hidden states of {tokens} tokens and new weight files need up to {size:,} bytes in '{tmp_path}', where "
        with pytest.raises(hlg.CheckpointError, match=f"{message}{room[0]:,} are free"):
            refit()
    room[0] = late
    refit()
