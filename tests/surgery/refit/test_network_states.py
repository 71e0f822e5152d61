"""The states of the two networks in one model: what may be within what, and that neither network does not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit.two_networks import Network, TwoNetworks


def networks_of(folder: Path) -> TwoNetworks:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    hlg.convert(model)
    networks = TwoNetworks(model, folder)
    networks.batches.keep([{"input": torch.randn(3, 4)}])
    return networks


def test_neither_network_runs(tmp_path: Path) -> None:
    """Outside of both contexts a forward is refused; within them it gives what plain torch gives for GELU and for ReLU."""
    networks = networks_of(tmp_path)
    first, _, second = networks.model
    x = networks.batches.get(0)["input"]
    forward = networks.forward(0)
    for refused in (forward, networks.check):
        with pytest.raises(RuntimeError, match=r"neither network here: run it within smooth\(\) or substituted\(\)"):
            refused()
    networks.hard = {"1"}
    with torch.no_grad():
        with networks.smooth():
            assert networks.state is Network.SMOOTH
            torch.testing.assert_close(forward()["0"], second(nn.functional.gelu(first(x))))
        with networks.substituted():
            assert networks.state is Network.SUBSTITUTED
            torch.testing.assert_close(forward()["0"], second(first(x).relu()))
    with pytest.raises(RuntimeError, match="neither"):
        forward()


@pytest.mark.parametrize("outer", ["smooth", "substituted"])
@pytest.mark.parametrize("inner", ["smooth", "substituted"])
def test_within_each_other(outer: str, inner: str, tmp_path: Path) -> None:
    """`smooth` may be within `smooth`; else the gates of one would meet the weights of the other. Nothing of it stays."""
    networks = networks_of(tmp_path)
    networks.hard = {"1"}
    with getattr(networks, outer)():
        before, gate = networks.state, networks.sites["1"].as_relu
        if outer == inner == "smooth":
            with networks.smooth():
                networks.check()
        else:
            with pytest.raises(RuntimeError, match=f"is the {outer} network"), getattr(networks, inner)():
                pass
        assert (networks.state, networks.sites["1"].as_relu) == (before, gate)
    assert (networks.state, networks.sites["1"].as_relu) == (None, False)


def test_an_error_ends_the_state(tmp_path: Path) -> None:
    """Whatever a block raises, the model is neither network afterwards, and the gates are smooth."""
    networks = networks_of(tmp_path)
    networks.hard = {"1"}
    for context in (networks.smooth, networks.substituted):
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
        assert (networks.state, networks.sites["1"].as_relu) == (None, False)
