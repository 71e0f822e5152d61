"""Exact verification of feed-forward blocks: of a small ViT and a small MLP-Mixer that read digits, and of MiniLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import hf_lambda_gelu as hlg

from ..verification.queries import digits
from .networks import TRAIN, Networks, sentence_networks, three
from .rows import Row, answer

WIDTH, UNITS, STEPS = 16, 32, 500
ROWS, LIMIT = 20, 10.0  # rows that are asked about; seconds for each


class Mixer(nn.Module):
    """MLP-Mixer (arXiv 2105.01601) for 8 × 8 images: 16 patches, mixed across and within, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, UNITS), nn.GELU(), nn.Linear(UNITS, WIDTH)) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(F.unfold(pixels, 2, stride=2).mT)
        for number, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            mixed = norm(x)
            x = x + (mlp(mixed) if number % 2 else mlp(mixed.mT).mT)
        return self.head(x.mean(1))


class Reader(NamedTuple):
    """A network that reads digits, three times; how many rows an image has in its blocks, and which is asked about."""

    networks: Networks
    positions: int
    position: int


def images() -> tuple[Tensor, Tensor]:
    """(1,797, 1, 8, 8) in [0, 1], and labels."""
    pixels, labels = digits()
    return pixels.reshape(-1, 1, 8, 8), labels


@cache
def vit() -> Reader:
    """ViT, 2 layers of 16, a class token and 16 patches."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=WIDTH,
        intermediate_size=UNITS,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=10,
    )
    return Reader(_trained(ViTForImageClassification(config)), 17, 0)


@cache
def mixer() -> Reader:
    """MLP-Mixer, 2 layers of 16; the row is a patch of the middle."""
    torch.manual_seed(0)
    return Reader(_trained(Mixer()), 16, 5)


def _trained(model: nn.Module) -> Networks:
    """With GELU, on 1,500 images; then with λ-GELU, and with ReLU."""
    pixels, labels = (part[:TRAIN] for part in images())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(STEPS):
        chosen = torch.randint(0, TRAIN, (128,))
        output: Any = model(pixels[chosen])
        optimizer.zero_grad()
        F.cross_entropy(getattr(output, "logits", output), labels[chosen]).backward()
        optimizer.step()
    batches: Sequence[Any] = list(pixels.split(300))
    if isinstance(model, ViTForImageClassification):
        batches = [{"pixel_values": batch} for batch in batches]
    return three(model.eval(), batches)


def blocks() -> Iterator[Row]:
    """Does a linear probe on a block's output keep its class? Both solvers; RuntimeError where they do not agree."""
    pixels, labels = images()
    for name, reader, epsilon in (("a ViT", vit(), 0.2), ("an MLP-Mixer", mixer(), 0.2)):
        site = list(hlg.hardness_sites(reader.networks.hardened))[-1]
        chosen = slice(reader.position, None, reader.positions)
        block, rows = hlg.feed_forward(reader.networks.relu, site, pixels[:TRAIN])
        question = _Question(site, pixels[TRAIN : TRAIN + ROWS], chosen, probe(block(rows[chosen]), labels[:TRAIN]), epsilon)
        what = f"FFN of {name}, {WIDTH}–{UNITS}–{WIDTH}, {ROWS} digits, ε = {epsilon}: does a probe's class hold?"
        yield Row("verify_robustness", what, *map(question.cell, reader.networks[:3]))
    yield minilm()


def minilm(epsilon: float = 0.001, rows: int = 4) -> Row:
    """A block of 384–1,536–384 and a random head of two classes: no question for a solver, so bounds have to do."""
    *networks, batches = sentence_networks()
    torch.manual_seed(0)
    question = _Question(list(hlg.hardness_sites(networks[1]))[-1], batches[0], slice(0, rows), nn.Linear(384, 2), epsilon)
    what = f"FFN of MiniLM, 384–1536–384, {rows} tokens, ε = {epsilon}: does a random class hold?"
    return Row("verify_robustness", what, *map(question.cell, networks))


class _Question(NamedTuple):
    """What is asked about a block of each network.

    Attributes:
        site: of its activation.
        inputs: of the network.
        chosen: which of the rows that enter the block.
        head: what tells the classes apart by the block's output.
        epsilon: of the ball around a row.
    """

    site: str
    inputs: Any
    chosen: slice
    head: nn.Linear
    epsilon: float

    def cell(self, model: nn.Module) -> str:
        """The answer for a model; "refused" where its block is smooth."""
        with torch.no_grad():
            block, rows = hlg.feed_forward(model, self.site, self.inputs)
        network = nn.Sequential(*block, self.head).eval()
        return answer(lambda: verdicts(network, rows[self.chosen], self.epsilon), (ValueError,), "smooth")


def probe(outputs: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression as a linear map."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000).fit(outputs.detach().numpy(), labels.numpy())
    head = nn.Linear(outputs.shape[1], 10)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(fitted.coef_))
        head.bias.copy_(torch.tensor(fitted.intercept_))
    return head


def verdicts(network: nn.Module, rows: Tensor, epsilon: float) -> str:
    """The verdicts, and how many of them a solver had to give; RuntimeError where the two solvers differ."""
    with torch.no_grad():
        classes = network(rows).argmax(1)
    marabou, highs = (
        hlg.verify_robustness(network, rows, classes, epsilon, solver=solver, time_limit=LIMIT)
        for solver in ("marabou", "highs")
    )
    for one, other in zip(marabou.verdicts, highs.verdicts, strict=True):
        decided = {"robust", "refuted"}
        if {one.verdict, other.verdict} == decided:
            raise RuntimeError(f"the solvers do not agree on row {one.index}: {one.verdict}, {other.verdict}")
    asked = sum(verdict.decided_by == "marabou" for verdict in marabou.verdicts)
    counts = ", ".join(f"{count} {name}" for name, count in marabou.counts.items() if count)
    return f"{counts}, {asked} by the solvers" if asked else f"{counts}, all by bounds and search"
