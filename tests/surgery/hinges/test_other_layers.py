"""Layers of other classes, and of experts, made wider: against stock transformers and float64; where gates get biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.experts import experts_model
from support.models import randomized
from support.other_layers import OTHER_LAYERS, other_inputs, other_layers, other_rows
from support.states import full_snapshot, whole_numbers
from support.stock import stock_outputs
from support.stops import stopped_after
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.hinges import work
from hf_lambda_gelu.surgery.refit import engine, two_networks

REFIT: dict[str, Any] = {"compensate": "least_squares"}
UNITS, WIDTH = 6, 5


@pytest.mark.parametrize("options", [{"hinges": 2}, {"hinges": 4}], ids=["data", "no data"])
def test_stock_reload(options: dict[str, Any], tmp_path: Path) -> None:
    """With data and without, stock transformers loads each exactly; `verify` finds nothing."""
    models, wanted = {}, {}
    for name in OTHER_LAYERS:
        model = other_layers(name)
        more = {"calibration": other_rows(name), **REFIT} if options["hinges"] == 2 else {}
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
        report = hlg.relu_ize(model, calibration=other_rows(name, 40), **REFIT, **options)
        left.append(report.relative_change)
    assert left[1] < 0.9 * left[0], left


STOPS: dict[str, tuple[Any, str, int]] = {
    "second layer measured": (work, "place", 2),
    "second layer widened": (two_networks.TwoNetworks, "widen", 2),
    "second layer refit": (engine, "decide", 2),
    "committed": (two_networks.TwoNetworks, "commit", 1),
    "configs": (work, "set_width", 1),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_failure_leaves_nothing(name: str) -> None:
    """Whatever stops it, weights, biases, widths and config are as they were, to the bit."""
    model = other_layers(name)
    before, batches = (full_snapshot(model), whole_numbers(model)), other_rows(name)
    for owner, attribute, at in STOPS.values():
        with stopped_after(owner, attribute, at):
            hlg.relu_ize(model, calibration=batches, **REFIT, hinges=2)
        assert (full_snapshot(model), whole_numbers(model)) == before, attribute


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
