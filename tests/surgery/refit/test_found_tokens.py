"""A model that finds its tokens itself: which rows are padding in its second part depends on its first part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lambda_gelu as hlg

EXAMPLES, POSITIONS, WIDTH = 10, 12, 8


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden_states + self.down(self.act(self.up(hidden_states)))


class Finds(nn.Module):
    """The first regions of an image, as many as are bright enough after the first part, or before, go through the second."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.after, self.first, self.norm, self.second = after, FeedForward(), nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.norm(self.first(pixel_values))
        bright = (hidden if self.after else pixel_values)[..., 0] > 0
        self.found = torch.arange(POSITIONS) < bright.sum(1, keepdim=True)
        hidden = torch.where(self.found[..., None], hidden, 50.0)
        return self.second(hidden, attention_mask=self.found)


def _model(after: bool) -> tuple[Finds, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = Finds(after).eval()
    model.first.down.weight.data *= 8.0
    return model, [{"pixel_values": torch.randn(EXAMPLES, POSITIONS, WIDTH)} for _ in range(3)]


def test_tokens_that_differ_between_the_networks_are_not_compared() -> None:
    """The second map then gets the bias that makes up for its own gate, on the tokens of the substituted network."""
    model, batches = _model(after=True)
    before = model.second.down.bias.detach().clone()
    with torch.no_grad():
        smooth = [(model(**batch), model.found)[1] for batch in batches]
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=batches, compensate="bias")
    errors, moved = [], 0
    for number, batch in enumerate(batches):
        seen: list[Tensor] = []
        watch = model.second.up.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad(), watch:
            model(**batch)
        moved += int((model.found != smooth[number]).sum())
        z = seen[0][model.found].double()
        errors.append((F.gelu(z) - F.relu(z)) @ model.second.down.weight.detach().double().T)
    assert moved
    assert report.compensation is not None
    assert [site.target for site in report.compensation.sites] == ["stream", "local"]
    torch.testing.assert_close(model.second.down.bias.detach() - before, torch.cat(errors).mean(0).float())


def test_tokens_that_are_the_same_are_compared_in_the_stream() -> None:
    model, batches = _model(after=False)
    hlg.convert(model)
    report = hlg.relu_ize(model, calibration=batches, compensate="bias")
    assert report.compensation is not None
    assert [site.target for site in report.compensation.sites] == ["stream", "stream"]
