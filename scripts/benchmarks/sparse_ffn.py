"""What skipping zeros saves when one token at a time is decoded on a CPU: dense time ÷ sparse time, interleaved in one run.

    python -m scripts.benchmarks.sparse_ffn                        # about five minutes
    python -m scripts.benchmarks.sparse_ffn --threads 2 --zeros 0.9

Blocks and models have random weights; a bias before the ReLU sets how many zeros there are, and those reported were counted.
Blocks: as many, one after the other, as make 200 MB, so that weights come from memory as they do in a model; a token is
another each time. Models: a Llama of 12 layers and the decoder of a Whisper-small, greedy decoding with a cache; the time is
that of a whole token, with attention and the head. A ratio is the median of nine repeats, in brackets least and most.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

SHAPES = [(768, 3072), (2048, 8192)]  # d, units
MEGABYTES = 200
WIDTH, UNITS, LAYERS, HEADS = 768, 3072, 12, 12  # of the models
VOCABULARY = {"llama": 32_000, "whisper": 51_865}
TOKENS = 8
HEAD = "| what | dtype | zeros | dense, ms | sparse, ms | dense ÷ sparse |\n|" + "---|" * 6


@dataclass(frozen=True)
class Row:
    """One comparison: milliseconds of both, and the ratio with its spread."""

    what: str
    dtype: str
    zeros: float
    dense: float
    sparse: float
    ratio: float
    least: float
    most: float

    def __str__(self) -> str:
        return (
            f"| {self.what} | {self.dtype} | {self.zeros:.0%} | {self.dense:.2f} | {self.sparse:.2f} | "
            f"{self.ratio:.2f} [{self.least:.2f}–{self.most:.2f}] |"
        )


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


@torch.no_grad()
def blocks(dtype: torch.dtype, zeros: list[float]) -> Iterator[Row]:
    """Feed-forward blocks alone."""
    for width, units in SHAPES:
        for gated in (False, True):
            size = (3 if gated else 2) * width * units * dtype.itemsize
            count = max(2, round(MEGABYTES * 1e6 / size))
            for share in zeros:
                torch.manual_seed(0)
                dense = Stack([Block(width, units, gated, share) for _ in range(count)]).to(dtype).eval()
                tokens = torch.randn(16, count, width).to(dtype)
                what = f"{'gated ' if gated else ''}FFN {width}–{units}"
                yield compare(what, dense, lambda model: model, list(tokens), count)


def compare(
    what: str, dense: nn.Module, start: Callable[[nn.Module], Callable[[Tensor], object]], inputs: list[Tensor], per_run: int
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
    return Row(what, dtype, counted.zeros, first, second, statistics.median(ratios), min(ratios), max(ratios))


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


@torch.no_grad()
def models(dtype: torch.dtype, zeros: list[float]) -> Iterator[Row]:
    """Whole tokens."""
    for name, build in (("Llama, a token", llama), ("Whisper decoder, a token", whisper)):
        for share in zeros:
            torch.manual_seed(0)
            first = [torch.tensor([[token]]) for token in range(100, 116)]
            yield compare(name, build(share).to(dtype), decoder, first, TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.sparse_ffn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7, 0.9, 0.95])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads\n\n{HEAD}")
    for name in options.dtypes:
        for section in (blocks, models):
            for row in section(getattr(torch, name), options.zeros):
                print(row, flush=True)


if __name__ == "__main__":
    main()
