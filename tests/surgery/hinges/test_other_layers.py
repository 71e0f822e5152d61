"""Layers of other kinds made wider: gate and up in one map, 1×1 convolutions, experts: against float64, and stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny
from support.experts import experts_model
from support.models import randomized
from support.other_layers import OTHER_LAYERS, other_inputs, other_layers
from support.states import full_snapshot
from support.stock import stock_outputs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.hinges import work
from hf_lambda_gelu.surgery.hinges.minimax import Minimax
from hf_lambda_gelu.surgery.refit import engine, two_networks

REFIT: dict[str, Any] = {"compensate": "least_squares"}
UNITS, WIDTH = 6, 5
# not symmetric, as those of minimax are
FOUND = Minimax((-2.0, -0.5, 0.1, 0.7, 3.0), (0.1, 0.4, 0.3, 0.4, -0.2), 0.5)


def rows(name: str, count: int = 24) -> list[dict[str, Tensor]]:
    return [other_inputs(name, seed) for seed in range(count)]


# ------------------------------------------------------------------------------------------- one map for gate and up


class Fused(nn.Module):
    """One map for gate and up, whose outputs are cut in the way that it is made with."""

    def __init__(self, cut: str, as_conv1d: bool = False) -> None:
        super().__init__()
        self.cut = cut
        both = Conv1D(2 * UNITS, WIDTH) if as_conv1d else nn.Linear(WIDTH, 2 * UNITS)
        self.both, self.act, self.down = both, nn.GELU(), nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        if self.cut == "gate first":
            gate, up = y.chunk(2, -1)
        elif self.cut == "up first":
            up, gate = y.split(y.shape[-1] // 2, dim=-1)
        elif self.cut == "in turns":
            gate, up = y[..., ::2], y[..., 1::2]
        elif self.cut == "in turns, up first":
            up, gate = y.unflatten(-1, (-1, 2)).unbind(-1)
        elif self.cut == "by another dimension":
            gate, up = y.view(*y.shape[:-1], 2, -1)[..., 0, :], y.view(*y.shape[:-1], 2, -1)[..., 1, :]
        elif self.cut == "turned around":
            gate, up = y.chunk(2, -1)
            up = up.flip(-1)
        elif self.cut == "doubled":
            gate, up = y.chunk(2, -1)
            up = 2.0 * up
        elif self.cut == "overlapping":
            gate, up = y[..., :UNITS], y[..., 1 : UNITS + 1]
        elif self.cut == "used elsewhere":
            gate, up = y.chunk(2, -1)
            return self.down(self.act(gate) * up) + up[..., :WIDTH]
        else:  # the gate is a copy, of which nothing tells where it was
            gate, up = (half.contiguous() for half in y.chunk(2, -1))
        return self.down(self.act(gate) * up)


# how it is cut → which outputs are the gate's and the up map's unit by unit
CUTS: dict[str, tuple[range, range]] = {
    "gate first": (range(UNITS), range(UNITS, 2 * UNITS)),
    "up first": (range(UNITS, 2 * UNITS), range(UNITS)),
    "in turns": (range(0, 2 * UNITS, 2), range(1, 2 * UNITS, 2)),
    "in turns, up first": (range(1, 2 * UNITS, 2), range(0, 2 * UNITS, 2)),
    "by another dimension": (range(UNITS), range(UNITS, 2 * UNITS)),
}


@pytest.mark.parametrize(("cut", "as_conv1d"), [*((cut, False) for cut in CUTS), ("up first", True), ("in turns", True)])
def test_fused_layer_computes_the_sum(cut: str, as_conv1d: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neuron by neuron, Σᵢ aᵢ relu(z − tᵢ) u through the old halves is what the wider layer puts out, at λ = 3."""
    monkeypatch.setattr(work, "minimax", lambda base, hinges: FOUND)
    torch.manual_seed(0)
    model = Fused(cut, as_conv1d)
    with torch.no_grad():
        model.both.weight.normal_(std=0.3)
        model.both.bias.normal_(std=0.3)
    hlg.convert(model, init_hardness=3.0)
    x = 3.0 * torch.randn(2, 7, WIDTH)
    w, b = (p.detach().double().numpy() for p in (model.both.weight.T if as_conv1d else model.both.weight, model.both.bias))
    w2, b2 = (p.detach().double().numpy() for p in (model.down.weight, model.down.bias))
    report = hlg.relu_ize(model, calibration=[x], hinges=5)
    assert report.hinges is not None
    assert report.hinges.sites[0].units == (UNITS, 5 * UNITS)
    with torch.no_grad():
        got = model(x).double().numpy().reshape(-1, WIDTH)
    gates, ups = CUTS[cut]
    for row, entry in enumerate(x.double().numpy().reshape(-1, WIDTH)):
        wanted = b2.copy()
        for unit, (gate, up) in enumerate(zip(gates, ups, strict=True)):
            z = w[gate] @ entry + b[gate]
            value = sum(a * max(z - t / 3.0, 0.0) for a, t in zip(FOUND.weights, FOUND.at, strict=True))
            wanted += w2[:, unit] * value * (w[up] @ entry + b[up])
        assert np.abs(got[row] - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())
    assert (model.both.nf if as_conv1d else model.both.out_features, model.down.in_features) == (10 * UNITS, 5 * UNITS)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ("turned around", "Flip stands between"),
        ("doubled", r"what the map after it gets is not its output, or that times another map's"),
        ("overlapping", r"what the map after it gets is not its output, or that times another map's"),
        ("used elsewhere", "the model puts out what the map before it does"),
        ("copied", r"is cut in parts by Split"),
    ],
)
def test_fused_layer_that_is_no_such_block(cut: str, reason: str) -> None:
    """What is not relu(z) · u of the two halves is refused, and the model as it was."""
    torch.manual_seed(0)
    model = Fused(cut)
    hlg.convert(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(hlg.HingeError, match=reason):
        hlg.relu_ize(model, calibration=[torch.randn(4, WIDTH)], hinges=4)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_budget_of_a_fused_layer() -> None:
    """A unit of the wider layer has gate and up rows of one neuron; its width is the config's, each neuron is there."""
    model = other_layers("modernbert")
    old = [model.layers[i].mlp.Wi.weight.detach().clone() for i in (0, 1)]
    report = hlg.relu_ize(model, calibration=rows("modernbert"), **REFIT, budget=1.5)
    assert report.hinges is not None
    assert report.hinges.widths == {"intermediate_size": (37, 56)}
    assert (model.config.intermediate_size, model.config.mlp_bias) == (56, True)
    assert report.compensation is not None
    assert report.compensation.bias_attribute == "mlp_bias"
    for layer, site in enumerate(report.hinges.sites):
        mlp = model.layers[layer].mlp
        assert (mlp.Wi.out_features, mlp.Wo.in_features, len(mlp.Wi.bias)) == (112, 56, 112)
        assert not mlp.Wi.bias[56:].any()
        pairs = {(g.numpy().tobytes(), u.numpy().tobytes()) for g, u in zip(*old[layer].chunk(2), strict=True)}
        wide = [(g.numpy().tobytes(), u.numpy().tobytes()) for g, u in zip(*mlp.Wi.weight.detach().chunk(2), strict=True)]
        assert set(wide) == pairs
        assert sum(number * count for number, count in site.neurons.items()) == 56


# ------------------------------------------------------------------------------------------------ 1×1 convolutions


class Pointwise(nn.Module):
    """Two convolutions in one or two dimensions, with as many channels as positions, so that no shape tells them apart."""

    def __init__(self, dims: int, between: str = "") -> None:
        super().__init__()
        kind, self.between = (nn.Conv1d, nn.Conv2d)[dims - 1], between
        self.before, self.act, self.after = kind(UNITS, UNITS, 1), nn.SiLU(), kind(UNITS, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.before(x))
        return self.after(h.transpose(1, -1) if self.between == "Transpose" else h.permute(0, 2, 1) if self.between else h)


@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_compute_the_sum(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel by channel and position by position, as for a linear layer."""
    monkeypatch.setattr(work, "minimax", lambda base, hinges: FOUND)
    torch.manual_seed(0)
    model = Pointwise(dims)
    hlg.convert(model, init_hardness=2.0)
    x = 3.0 * torch.randn(2, UNITS, *[UNITS] * dims)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (*model.before.parameters(), *model.after.parameters()))
    w1, w2 = w1.reshape(UNITS, UNITS), w2.reshape(WIDTH, UNITS)
    report = hlg.relu_ize(model, calibration=[x], hinges=5)
    assert report.hinges is not None
    assert report.hinges.sites[0].units == (UNITS, 5 * UNITS)
    with torch.no_grad():
        got = model(x).double().numpy()
    for place in np.ndindex(2, *[UNITS] * dims):
        at = (place[0], slice(None), *place[1:])
        z = w1 @ x.double().numpy()[at] + b1
        h = sum(a * np.maximum(z - t / 2.0, 0.0) for a, t in zip(FOUND.weights, FOUND.at, strict=True))
        wanted = w2 @ h + b2
        assert np.abs(got[at] - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())
    assert (model.before.out_channels, model.after.in_channels) == (5 * UNITS, 5 * UNITS)


@pytest.mark.parametrize("between", ["Transpose", "Permute"])
def test_channels_that_change_places(between: str) -> None:
    """Where positions become the channels of the next convolution, a unit is none of its channels."""
    torch.manual_seed(0)
    model = Pointwise(1, between)
    hlg.convert(model)
    with pytest.raises(hlg.HingeError, match=f"{between} stands between"):
        hlg.relu_ize(model, calibration=[torch.randn(2, UNITS, UNITS)], hinges=4)


class Mixed(nn.Module):
    """A linear map before, a convolution after."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.act, self.after = nn.Linear(WIDTH, UNITS), nn.GELU(), nn.Conv1d(UNITS, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.before(x)).permute(0, 2, 1))


def test_a_linear_map_and_a_convolution() -> None:
    """As a readout between two parts of a model has them, whose width is that of both: it keeps one ReLU per neuron."""
    model = Mixed()
    hlg.convert(model)
    with pytest.raises(hlg.HingeError, match="one of the maps before and after it is a convolution, and another none"):
        hlg.relu_ize(model, calibration=[torch.randn(2, 7, WIDTH)], hinges=4)


def test_rows_of_a_convolution() -> None:
    """A calibration set that is too small is told by its positions: 2 × 8 × 8 are 128 rows, and channels are none."""
    model = other_layers("poolformer", mlp_ratio=12.0)
    before = full_snapshot(model)
    with pytest.raises(hlg.CalibrationError, match="will have 288 units, and the calibration set has about 128 rows"):
        hlg.relu_ize(model, calibration=rows("poolformer", 1), **REFIT, hinges=2)
    assert full_snapshot(model) == before


def test_a_ratio_that_the_class_rounds() -> None:
    """12 × 2.0333… are 24 channels, three times as wide 73: too many for 3 each, told before work is done; a budget fits."""
    sizes = {"hidden_sizes": [12, 12], "mlp_ratio": 24.4 / 12}
    model = other_layers("poolformer", **sizes)
    before = full_snapshot(model)
    with pytest.raises(hlg.HingeError, match=r"has 73 units in the place of 24, as it rounds, and 3 times as many"):
        hlg.relu_ize(model, calibration=rows("poolformer"), **REFIT, hinges=3)
    assert full_snapshot(model) == before
    report = hlg.relu_ize(model, calibration=rows("poolformer"), **REFIT, budget=3.0)
    assert report.hinges is not None
    assert {site.units for site in report.hinges.sites} == {(24, 73)}


# ----------------------------------------------------------------------------------------- of transformers' classes


@pytest.mark.parametrize("options", [{"hinges": 2}, {"hinges": 4}], ids=["data", "no data"])
def test_stock_reload(options: dict[str, Any], tmp_path: Path) -> None:
    """With data and without, stock transformers loads each exactly; `verify` finds nothing."""
    models, wanted = {}, {}
    for name in OTHER_LAYERS:
        model = other_layers(name)
        more = {"calibration": rows(name), **REFIT} if options["hinges"] == 2 else {}
        report = hlg.relu_ize(model, **options, **more)
        assert report.hinges is not None
        assert not report.hinges.single
        assert all(s.neurons == {options["hinges"]: s.units[0]} for s in report.hinges.sites)
        assert all((s.bound is None) == bool(more) for s in report.hinges.sites)
        batch = other_inputs(name, 99)
        hlg.save_relu_pretrained(model, tmp_path / name)
        models[name], wanted[name] = (type(model).__name__, batch), tiny.outputs(model, batch)
        if name == "modernbert":
            assert hlg.verify_relu_pretrained(model, tmp_path / name) == 0.0
    for name, outputs in stock_outputs(models, tmp_path).items():
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted[name], strict=True)), name


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_nearer_with_data(name: str) -> None:
    """On rows that it was fitted on, the wider layers leave less than the layers as they are."""
    left = []
    for options in ({}, {"hinges": 3}):
        model = other_layers(name)
        report = hlg.relu_ize(model, calibration=rows(name, 40), **REFIT, **options)
        left.append(report.relative_change)
    assert left[1] < 0.9 * left[0], left


class Stop(BaseException):
    """What the test raises."""


STOPS: dict[str, tuple[Any, str, int]] = {
    "second layer measured": (work, "place", 2),
    "second layer widened": (two_networks.TwoNetworks, "widen", 2),
    "second layer refit": (engine, "decide", 2),
    "committed": (two_networks.TwoNetworks, "commit", 1),
    "configs": (work, "set_width", 1),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_failure_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops it, weights, biases, widths and config are as they were, to the bit."""
    model = other_layers(name)
    before, batches = full_snapshot(model), rows(name)
    numbers = {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()}
    for owner, attribute, at in STOPS.values():
        calls, original = 0, getattr(owner, attribute)

        def stopping(*args: Any, original: Any = original, at: int = at, **kwargs: Any) -> Any:
            nonlocal calls
            result = original(*args, **kwargs)
            calls += 1
            if calls == at:
                raise Stop
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, stopping)
            with pytest.raises(Stop):
                hlg.relu_ize(model, calibration=batches, **REFIT, hinges=2)
        assert full_snapshot(model) == before, attribute
        assert {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()} == numbers


# ------------------------------------------------------------------------------------------------- what is refused


def test_no_bias_is_what_is_said_first() -> None:
    """Of maps that make gate and up, of experts, and where the width would be another reason."""
    phi = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **tiny.GATED, pad_token_id=0))
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "first_k_dense_replace": 0}
    glm = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **tiny.GATED, **experts, pad_token_id=0))
    cases = {
        # its shared experts are as wide as those in stacks, by the same number of the config
        "glm4_moe": (randomized(glm), r"shared_experts\.gate_proj\.weight has no bias, and no config attribute"),
        "phi3": (randomized(phi), r"model\.layers\.0\.mlp\.gate_up_proj\.weight has no bias, and no config attribute"),
        "mixtral": (experts_model("mixtral"), "is one of the stacks of experts' weights, to which no biases belong"),
        "qwen2_moe": (experts_model("qwen2_moe"), r"shared_expert\.gate_proj\.weight has no bias, and no config attribute"),
    }
    for name, (model, reason) in cases.items():
        before = full_snapshot(model)
        data = [tiny.inputs(model, seed) for seed in range(8)]
        for options in ({"hinges": 4}, {"hinges": 2, "calibration": data, **REFIT}):
            with pytest.raises(hlg.HingeError, match=reason):
                hlg.relu_ize(model, **options)
            assert full_snapshot(model) == before, name


class SwitchConfig(PreTrainedConfig):
    model_type = "handmade_switch"

    def __init__(
        self, mlp_bias: bool = False, inner_size: int = 10, other_size: int = 12, hidden_act: str = "silu", **kwargs: Any
    ) -> None:
        self.mlp_bias, self.inner_size, self.other_size, self.hidden_act = mlp_bias, inner_size, other_size, hidden_act
        super().__init__(**kwargs)


class Switch(PreTrainedModel):
    """Two layers: a switch of the config gives the first one's maps biases; nothing gives the second's last map one."""

    config_class = SwitchConfig
    main_input_name = "inputs_embeds"

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__(config)
        self.both = nn.Linear(WIDTH, 2 * config.inner_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.inner_size, WIDTH, bias=config.mlp_bias)
        self.first, self.second = nn.Linear(WIDTH, config.other_size), nn.Linear(config.other_size, WIDTH, bias=False)
        self.act, self.act2 = ACT2FN[config.hidden_act], ACT2FN[config.hidden_act]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        gate, up = self.both(inputs_embeds).chunk(2, -1)
        x = inputs_embeds + self.down(self.act(gate) * up)
        return {"logits": x + self.second(self.act2(self.first(x)))}


@pytest.mark.parametrize("options", [{"hinges": 4}, {"hinges": 2, **REFIT}], ids=["no data", "data"])
def test_gates_get_biases_where_other_maps_cannot(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Switch(SwitchConfig())
    hlg.convert(model)
    data = [{"inputs_embeds": torch.randn(4, 16, WIDTH)} for _ in range(3)]
    report = hlg.relu_ize(model, calibration=data, **options)
    assert report.hinges is not None
    assert set(report.hinges.widths) == {"inner_size", "other_size"}
    assert (model.config.mlp_bias, model.second.bias) == (True, None)
    assert len(model.both.bias) == 2 * 10 * options["hinges"]
    assert bool(model.both.bias.any())
    rebuilt = {name: tensor.shape for name, tensor in Switch(model.config).state_dict().items()}
    assert rebuilt == {name: tensor.shape for name, tensor in model.state_dict().items()}


class Experts(nn.Module):
    """Experts with maps and gates of their own, the better of which each token goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        maps = [(nn.Linear(WIDTH, UNITS), nn.SiLU(), nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)) for _ in range(3)]
        self.experts = nn.ModuleList([nn.ModuleDict(dict(zip(("gate", "act", "up", "down"), m, strict=True))) for m in maps])

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = x[chosen == index]
            out[chosen == index] = expert["down"](expert["act"](expert["gate"](rows)) * expert["up"](rows))
        return x + out


def test_experts_with_maps_of_their_own() -> None:
    """Each is a layer like any other, if its map has a bias: 4 hinges are within the bound, times what is summed up."""
    torch.manual_seed(0)
    model = Experts()
    hlg.convert(model)
    x = 2.0 * torch.randn(64, WIDTH)
    before = {}
    for index, expert in enumerate(model.experts):
        before[index] = [p.detach().clone() for n, p in expert.named_parameters() if n.endswith(("weight", "bias"))]
    with torch.no_grad():
        chosen = model.router(x).argmax(-1)
        report = hlg.relu_ize(model, calibration=[x], hinges=4)
        assert report.hinges is not None
        assert len(report.hinges.sites) == 3
        got = model(x)
        for index, (w1, b1, w3, b3, w2, b2) in before.items():
            rows = x[chosen == index]
            assert len(rows)
            u = F.linear(rows, w3, b3)
            smooth = rows + F.linear(F.silu(F.linear(rows, w1, b1)) * u, w2, b2)
            bound = report.hinges.sites[index].bound * (u.abs() @ w2.abs().T)
            assert bool(((got[chosen == index] - smooth).abs() <= bound + 1e-5).all())
