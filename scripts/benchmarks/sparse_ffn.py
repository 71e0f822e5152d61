"""What skipping zeros saves when one token at a time is decoded on a CPU: dense time ÷ sparse time, interleaved in one run.

    python -m scripts.benchmarks.sparse_ffn            # what results/sparse-ffn.csv lacks, a few minutes; prints the table
    python -m scripts.benchmarks.sparse_ffn --table    # the table alone
    python -m scripts.benchmarks.sparse_ffn --threads 2 --zeros 0.9 --results runs/sparse-ffn.csv

Blocks and models have random weights; a bias before the ReLU sets how many zeros there are, and those reported were counted.
Blocks: as many, one after the other, as make 200 MB, so that weights come from memory as they do in a model; a token is
another each time. Models: a Llama of 12 layers and the decoder of a Whisper-small, greedy decoding with a cache; the time is
that of a whole token, with attention and the head. A ratio is the median of nine repeats, in brackets least and most.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import hf_lambda_gelu as hlg
from scripts.benchmarks.cases import interleave
from scripts.tools.tables import append, read

RESULTS = Path(__file__).parent / "results" / "sparse-ffn.csv"
SHAPES = [(768, 3072), (2048, 8192)]  # d, units
MEGABYTES = 200
WIDTH, UNITS, LAYERS, HEADS = 768, 3072, 12, 12  # of the models
VOCABULARY = {"llama": 32_000, "whisper": 51_865}
TOKENS = 8
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """One comparison: zeros that were asked for and counted, milliseconds of both, and the ratio with its spread."""

    what: str
    dtype: str
    wanted: float
    zeros: float
    dense: float
    sparse: float
    ratio: float
    least: float
    most: float


FIELDS = ("threads", *(field.name for field in fields(Row)), "torch")


class Block(nn.Module):
    """W₂ max(0, W₁x + b₁), times W₃x where it is gated."""

    def __init__(self, width: int, units: int, gated: bool, zeros: float) -> None:
        super().__init__()
        self.gate, self.relu = nn.Linear(width, units), nn.ReLU()
        self.up = nn.Linear(width, units, bias=False) if gated else None
        self.down = nn.Linear(units, width)
        with torch.no_grad():
            set_zeros(self.gate, zeros)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.gate(x))
        out: Tensor = self.down(h if self.up is None else h * self.up(x))
        return out


class Stack(nn.Module):
    """Blocks that each get a token of their own."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """x (blocks, d) → (blocks, d)."""
        return torch.cat([block(row[None]) for block, row in zip(self.blocks, x, strict=True)])


def set_zeros(before: nn.Linear, zeros: float) -> None:
    """Weights and bias with which about this share of W₁x + b₁ is negative, for x of unit variance."""
    before.weight.normal_(std=before.in_features**-0.5)
    before.bias.fill_(-statistics.NormalDist().inv_cdf(zeros))


def block_names() -> dict[str, tuple[int, int, bool]]:
    """Width, units and whether it is gated, by what a row calls it."""
    return {
        f"{'gated ' if gated else ''}FFN {width}–{units}": (width, units, gated)
        for width, units in SHAPES
        for gated in (False, True)
    }


def measure_block(what: str, dtype: torch.dtype, zeros: float) -> Row:
    """Feed-forward blocks alone."""
    width, units, gated = block_names()[what]
    size = (3 if gated else 2) * width * units * dtype.itemsize
    count = max(2, round(MEGABYTES * 1e6 / size))
    dense = Stack([Block(width, units, gated, zeros) for _ in range(count)]).to(dtype).eval()
    tokens = torch.randn(16, count, width).to(dtype)
    return compare(what, zeros, dense, lambda model: model, list(tokens), count)


def compare(
    what: str,
    wanted: float,
    dense: nn.Module,
    start: Callable[[nn.Module], Callable[[Tensor], object]],
    inputs: list[Tensor],
    per_run: int,
) -> Row:
    """Both on the same inputs, which take turns. `start` gives what runs a model on one; times are divided by `per_run`."""
    ready_made = isinstance(dense, PreTrainedModel)
    counted = hlg.activation_sparsity(dense, samples(dense) if ready_made else inputs[:2])
    sparse = copy.deepcopy(dense)
    hlg.sparsify_ffn(sparse, None if ready_made else inputs[0])
    runs = [start(dense), start(sparse)]
    turns = [0, 0]

    def turn(which: int) -> object:
        turns[which] += 1
        return runs[which](inputs[turns[which] % len(inputs)])

    repeats = interleave(lambda: turn(0), lambda: turn(1), "cpu", seconds=0.5)
    ratios = [first / second for first, second in repeats]
    first, second = (statistics.median(times) * 1e3 / per_run for times in zip(*repeats, strict=True))
    dtype = str(next(dense.parameters()).dtype).removeprefix("torch.")
    return Row(what, dtype, wanted, counted.zeros, first, second, statistics.median(ratios), min(ratios), max(ratios))


def llama(zeros: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY["llama"], hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, hidden_act="relu", mlp_bias=True, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        set_zeros(layer.mlp.gate_proj, zeros)
    return model


def whisper(zeros: float) -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=VOCABULARY["whisper"], d_model=WIDTH, encoder_layers=1, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=UNITS, decoder_ffn_dim=UNITS,
        activation_function="relu", pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        set_zeros(layer.fc1, zeros)
    return model


def samples(model: nn.Module) -> list[dict[str, Tensor]]:
    ids = torch.randint(10, 1000, (4, 8))
    if isinstance(model, LlamaForCausalLM):
        return [{"input_ids": ids}]
    features = torch.randn(4, 80, 3000, dtype=next(model.parameters()).dtype)
    return [{"input_features": features[:1], "decoder_input_ids": ids[:1]}]


def decoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Runs greedy decoding: `TOKENS` tokens after a first one. What is heard is there before: Whisper takes it in once."""
    given: dict[str, object] = {}
    heard: EncoderDecoderCache | None = None
    if isinstance(model, WhisperForConditionalGeneration):
        states = torch.randn(1, 1500, model.config.d_model, dtype=model.dtype)
        given["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        heard = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model(decoder_input_ids=torch.tensor([[1]]), past_key_values=heard, use_cache=True, **given)

    def run(token: Tensor) -> Tensor:
        cache = DynamicCache() if heard is None else EncoderDecoderCache(DynamicCache(), heard.cross_attention_cache)
        name = "input_ids" if heard is None else "decoder_input_ids"
        for _ in range(TOKENS):
            token = model(**{name: token}, past_key_values=cache, use_cache=True, **given).logits[:, -1:].argmax(-1)
        return token

    return run


MODELS: dict[str, Callable[[float], PreTrainedModel]] = {"Llama, a token": llama, "Whisper decoder, a token": whisper}


@torch.no_grad()
def measure(what: str, dtype: torch.dtype, zeros: float) -> Row:
    """A block, or whole tokens of a model."""
    torch.manual_seed(0)
    if what not in MODELS:
        return measure_block(what, dtype, zeros)
    first = [torch.tensor([[token]]) for token in range(100, 116)]
    return compare(what, zeros, MODELS[what](zeros).to(dtype), decoder, first, TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.sparse_ffn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--dtypes", nargs="+", choices=SHORT, default=list(SHORT))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown, and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = itertools.product(options.dtypes, (*block_names(), *MODELS), options.zeros)
    for dtype, what, zeros in [] if options.table else wanted:
        run(options.results, options.threads, what, dtype, zeros)
    print(table(read(options.results)))


def run(results: Path, threads: int, what: str, dtype: str, zeros: float) -> None:
    """Measure and append, unless the row is there."""
    key = {"threads": str(threads), "what": what, "dtype": dtype, "wanted": f"{zeros:g}"}
    if any(key.items() <= row.items() for row in read(results)):
        return
    found = asdict(measure(what, getattr(torch, dtype), zeros))
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    append(results, FIELDS, [{**shown, **key, "torch": torch.__version__}])


def table(rows: list[dict[str, str]]) -> str:
    """Dense ÷ sparse time, its median, least and most: a line for each block and model."""
    columns = sorted({(row["dtype"], row["wanted"]) for row in rows}, key=lambda kind: (list(SHORT).index(kind[0]), kind[1]))
    heads = [f"{SHORT[dtype]}, {float(zeros):.0%} zeros".replace("%", " %") for dtype, zeros in columns]
    lines = [f"| dense time ÷ sparse time | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    own = {(row["what"], row["dtype"], row["wanted"]): row for row in rows}
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = [_ratio(own[(what, *kind)]) if (what, *kind) in own else "–" for kind in columns]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(row: dict[str, str]) -> str:
    ratio, least, most = (float(row[name]) for name in ("ratio", "least", "most"))
    return f"{ratio:.2f} ({least:.2f}–{most:.2f})"


if __name__ == "__main__":
    main()
