"""Weight files without λ: to the byte what safetensors writes, and never a whole file in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.folders import LEAF, same_tensors
from support.processes import in_fork

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints import shards


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
        patch.setattr(shards, "_CHUNK", 4099)
        shards.write_changed(tmp_path / "all", tmp_path / "kept", set(tensors) - set(kept), {})
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
    shards.write_changed(tmp_path / "unsorted", tmp_path / "aligned", {"s"}, {})
    same_tensors(load_file(tmp_path / "aligned"), {"x": torch.tensor([2.0]), "n": torch.tensor([5, 6])})
    raw = (tmp_path / "aligned").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length + json.loads(raw[8 : 8 + length])["n"]["data_offsets"][0]) % 8 == 0


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
    process = in_fork(MEMORY, str(tmp_path))
    assert process.returncode == 0, process.stderr[-3000:]
    peaks = json.loads(process.stdout.splitlines()[-1])
    assert peaks[-1] - peaks[0] < 0.1 * (sizes[1] - sizes[0]), peaks
    shutil.rmtree(tmp_path)
