"""The benchmark on sizes too small to time: what it runs, what it counts, what it writes."""

from __future__ import annotations

import argparse
import csv
import json
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_lambda_gelu as hlg
from scripts.benchmarks import cases, refit, refit_parts, report, run, sparse_ffn, streaming
from scripts.tools.tables import append


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def bert(device: str) -> tuple[BertForSequenceClassification, dict[str, torch.Tensor]]:
        config = BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        return BertForSequenceClassification(config), {
            "input_ids": torch.ones(2, 5, dtype=torch.long),
            "labels": torch.zeros(2).long(),
        }

    monkeypatch.setattr(cases, "SIZES", {"cpu": [(32, 64)]})
    monkeypatch.setattr(cases, "REPEATS", 3)
    monkeypatch.setattr(cases, "bert", bert)
    monkeypatch.setattr(cases, "vit", bert)
    interleave = cases.interleave
    monkeypatch.setattr(cases, "interleave", lambda *args, seconds: interleave(*args, seconds=0.0))
    threads, kernels = torch.get_num_threads(), hlg.set_kernels("auto")
    monkeypatch.setattr(run.torch, "set_num_threads", lambda n: None)
    yield
    torch.set_num_threads(threads)
    hlg.set_kernels(kernels)


def test_whole_run(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every rival has a row. Memory is counted, so its ratios are exact: x and λ for the kernel, x for F.gelu."""
    arguments = ["--only", "activation", "step", "conversion", "--results", str(tmp_path), "--plots", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    run.main()
    (table,), (document,), (plot,) = (list(tmp_path.glob(f"*.{end}")) for end in ("csv", "json", "png"))
    assert f"torch{torch.__version__.split('+')[0]}" in table.name
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.open()))
    kept = {
        row["what"]: float(row["memory"]) for row in rows if row["dtype"] == "float32" and row["section"] == "activation"
    }
    size = 32 * 64
    assert kept["λ-GELU"] == pytest.approx(1 + 1 / size, rel=1e-3)
    assert kept["λ-GELU, λ per neuron"] == pytest.approx(1 + 64 / size, rel=1e-3)
    assert kept["λ-GELU, autograd"] == pytest.approx(3, abs=0.01)
    assert kept["learnable Swish"] == pytest.approx(2, abs=0.01)
    assert all(0 < float(row["least"]) <= float(row["time"]) <= float(row["most"]) for row in rows)
    assert [row["what"] for row in rows if row["section"] == "training step"] == ["λ-GELU"] * 2
    found = json.loads(document.read_text())
    assert len(found["ratios"]) == len(rows) == 2 * 6 + 2
    assert found["machine"]["torch"] == torch.__version__
    assert {each["verb"] for each in found["conversion"]} == {"convert", "relu_ize"}
    assert all(math.isfinite(each["seconds"]) for each in found["conversion"])
    assert "| float32 | 32×64 | xIELU |" in capsys.readouterr().out


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take turns and change who is first; the ratio is that of the clock, here one that each run moves on."""
    clock, calls = [0.0], []
    monkeypatch.setattr(cases.time, "perf_counter", lambda: clock[0])

    def run(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    repeats = cases.interleave(lambda: run("stock", 2.0), lambda: run("ours", 3.0), "cpu", seconds=20.0)
    assert repeats == [[2.0, 3.0]] * cases.REPEATS
    assert calls[:6] == ["stock", "ours"] * 3
    assert calls[6:14] == ["ours", "stock", "stock", "ours", "ours", "stock", "stock", "ours"]


def test_saved_bytes() -> None:
    """Each storage once, views of it not again."""
    x = torch.randn(10, 10, requires_grad=True)
    assert cases.saved_bytes(lambda: F.gelu(x)) == 400
    assert cases.saved_bytes(lambda: F.gelu(x[:5]).sum() + F.gelu(x).sum()) == 400
    assert cases.saved_bytes(lambda: x * 2) == 0


def test_unknown_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "speed"])
    with pytest.raises(SystemExit, match="unknown section speed: expected activation, compile, step or conversion"):
        run.main()


def test_sparse_blocks_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for every block and model; the zeros that were counted are about those that were asked for; none twice."""
    interleave = cases.interleave
    monkeypatch.setattr(sparse_ffn, "interleave", lambda *args, seconds: interleave(*args, seconds=0.0))
    monkeypatch.setattr(cases, "REPEATS", 2)
    for name, value in {"SHAPES": [(64, 256)], "MEGABYTES": 0.3, "WIDTH": 64, "UNITS": 256, "LAYERS": 2, "HEADS": 2}.items():
        monkeypatch.setattr(sparse_ffn, name, value)
    monkeypatch.setattr(sparse_ffn, "VOCABULARY", {"llama": 2000, "whisper": 2000})
    results = tmp_path / "sparse-ffn.csv"
    arguments = ["--zeros", "0.9", "--dtypes", "float32", "--threads", "1", "--results", str(results)]
    monkeypatch.setattr("sys.argv", ["sparse_ffn.py", *arguments])
    sparse_ffn.main()
    rows = list(csv.DictReader(results.open()))
    assert [row["what"] for row in rows] == ["FFN 64–256", "gated FFN 64–256", "Llama, a token", "Whisper decoder, a token"]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert all(0.8 <= float(row["zeros"]) <= 0.97 for row in rows)
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head == "| dense time ÷ sparse time | fp32, 90 % zeros |"
    ratio, least, most = (float(rows[0][name]) for name in ("ratio", "least", "most"))
    assert first == f"| FFN 64–256 | {ratio:.2f} ({least:.2f}–{most:.2f}) |"
    monkeypatch.setattr(sparse_ffn, "measure", lambda *_: pytest.fail("measured again"))
    sparse_ffn.main()


def test_refit_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table by size, however rows came; a size that is there is not measured again."""
    results = tmp_path / "refit.csv"
    for size, parameters in (("small", 2_000_000), ("tiny", 1_000_000)):
        row = {
            "size": size,
            "threads": 1,
            "parameters": parameters,
            "seconds": 6.0,
            "forward": 0.5,
            "memory": 12,
            "torch": "",
        }
        append(results, refit.FIELDS, [row])
    monkeypatch.setattr(refit, "run_module", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("sys.argv", ["refit.py", "--sizes", "tiny", "small", "--results", str(results)])
    refit.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| tiny | 1.0 | 4 | 6.0 | 12.0 | 12 | 3.0 × |",
        "| small | 2.0 | 8 | 6.0 | 12.0 | 12 | 1.5 × |",
    ]


def test_tables_of_costs() -> None:
    """Each number is in the cell of its dtype, shape and rival; other rows are left out."""
    names = ["section", "dtype", "shape", "what", "time", "least", "most", "memory"]
    measured = [
        dict(
            zip(
                names,
                map(str, ("activation", dtype, shape, what, place + k, place, place + 2 * k, 1 + k / 100)),
                strict=True,
            )
        )
        for k, (dtype, shape) in enumerate([*report.SHOWN, ("float32", "9×9")])
        for place, what in enumerate([*report.RIVALS, "λ-GELU, autograd"])
    ]
    lines = report.activations(measured[::-1]).splitlines()
    assert lines[0] == "| | fp32, 1024 × 3072 | bf16, 1024 × 3072 | fp32, 64 × 3072 | kept for backward |"
    assert lines[3] == "| λ-GELU, λ per neuron | 1.00 (1.00–1.00) | 2.00 (1.00–3.00) | 3.00 (1.00–5.00) | 1.00–1.02 |"
    names = ["dtype", "elements", "pass", "what", "of_gelu", "share_of_copy"]
    kinds = [("forward", "λ-GELU", 1.004, 0.876), ("backward", "λ-GELU", 1.5, 1.0), ("forward", "copy", 0.9, 1.0)]
    kinds += [("forward", "λ-GELU, λ per neuron", 2.0, 0.5), ("backward", "λ-GELU, λ per neuron", 3.0, 0.25)]
    of_kernels = [dict(zip(names, map(str, ("bfloat16", 16777216, *kind)), strict=True)) for kind in kinds]
    assert report.kernels(of_kernels).splitlines()[::2] == [
        "| elements | bf16, 17M |",
        "| forward | 1.00, 88 % |",
        "| forward, λ per neuron | 2.00, 50 % |",
    ]
    names = ["blocks", "parameters", "way", "peak_mb", "seconds"]
    ways = [("8", "5000000", "in memory", "300", "7.6"), ("8", "5000000", "streamed", "200", "5.4")]
    runs = [dict(zip(names, way, strict=True)) for way in ways]
    assert report.streaming(runs).splitlines()[2:] == ["| 8 | 20 | 200 | 300 | 5 | 8 |"]


def test_parts_of_a_streamed_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading within a pass counts as reading alone; the model has about as many parameters as were asked for."""
    now = [0.0]
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: now[0])
    clock = streaming.Clock(synchronise=False)

    def spend(seconds: float) -> None:
        now[0] += seconds

    read = clock._timed(spend, "read")
    clock._timed(lambda: (spend(5.0), read(2.0), read(1.0)), "forward")()
    read(4.0)
    assert clock.seconds == {"read": 7.0, "forward": 5.0, "gram": 0.0, "solve": 0.0, "write": 0.0}
    for wanted in (1.3e9, 3e9):
        (config,) = streaming.configs(Namespace(parameters=wanted))
        with torch.device("meta"):
            assert abs(LlamaForCausalLM(config).num_parameters() - wanted) < 0.05 * wanted


def test_streamed_runs_stay_small() -> None:
    """The committed table: at most two blocks, the sums, a batch and 300 MB whatever the depth; 1.3 × the time of memory."""
    rows = [row for path in streaming.RESULTS.glob("streaming-cpu-*.csv") for row in csv.DictReader(path.open())]
    assert {int(row["blocks"]) for row in rows} == {8, 16, 32}
    for row in (row for row in rows if row["way"] == "streamed"):
        allowed = 2 * float(row["block_mb"]) + float(row["moments_mb"]) + float(row["batch_mb"]) + 300
        assert float(row["peak_mb"]) <= allowed
        same = [r for r in rows if all(r[n] == row[n] for n in ("blocks", "hinges", "repeat"))]
        (memory,) = (r for r in same if r["way"] == "in memory")
        assert memory["relative_change"] == row["relative_change"]


def test_refit_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit's parts add up to its time, the floor runs each layer three times, and ratios are those of a round."""
    config = LlamaConfig(vocab_size=50000, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    made: list[LlamaForCausalLM] = []
    ran: list[None] = []

    def load(layers: int) -> LlamaForCausalLM:
        made.append(LlamaForCausalLM(config).eval())
        made[-1].model.layers[0].register_forward_hook(lambda *_: ran.append(None))
        return made[-1]

    monkeypatch.setattr(refit_parts, "load", load)
    options = argparse.Namespace(layers=2, tokens=64, length=8, batch=2)
    floor = refit_parts.measure("floor", options)
    assert len(ran) == 1 + 3 * 4
    assert {"passes", "gram"} <= floor.keys()
    found = refit_parts.measure("refit", options)
    assert sum(found[part] for part in refit_parts.PARTS) == pytest.approx(found["seconds"], abs=0.05)
    assert found["solves"] >= 0.0
    rows = [{"round": n, "what": "floor", "seconds": 2.0 * (n + 1), "memory": 5} for n in range(3)]
    rows += [{"round": n, "what": "refit", "seconds": 3.0 * (n + 1), "memory": 7} for n in range(3)]
    assert refit_parts.table(rows).splitlines()[-1].startswith("| refit | 6 | 1.50 | 7 |")
