"""FSDP2: λ learned in sharded weights, against the same run without, by SGD, which hides no factor."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from support.processes import in_child
from support.training import Rows, arguments, converted
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.switch import check_calibratable


def test_learns_as_without(tmp_path: Path) -> None:
    in_child(partial(learns_as_without, tmp_path))


def learns_as_without(tmp_path: Path) -> None:
    """In a group of one process: weights are DTensors all the same."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh, rows = init_device_mesh("cpu", (1,)), Rows()
    batch = {"input_ids": rows.tokens, "labels": rows.labels}
    profiles = []
    for sharded in (False, True):
        model = converted(hardness=1.7).eval()
        if sharded:
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(hasattr(p, "full_tensor") for p in model.parameters())
        optimizer = torch.optim.SGD(hlg.parameter_groups(model, 3.0), lr=0.01)
        hlg.attach_hardness_update(optimizer, model)
        seen = []
        for _ in range(5):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(hlg.hardness_profile(model))
        for site in hlg.hardness_sites(model).values():
            site.set_hardness(40.0)
        profiles.append([*seen, hlg.hardness_profile(model)])
    for one, other in zip(*profiles, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert max(abs(value - 1.7) for value in profiles[0][-2].values()) > 0.005
    assert "hardness=sharded" in repr(model)
    args = arguments(tmp_path, hardness_compensate="least_squares")
    with pytest.raises(ValueError, match="needs whole weights, which FSDP or DeepSpeed has cut up here: set hardness"):
        check_calibratable(args, model, rows)
    check_calibratable(args, nn.Linear(2, 2), rows)
    report = hlg.harden(model, [batch])  # one process has all parts
    assert {site.method for site in report.sites} <= {"least_squares", "bias"}
    assert list(hlg.hardness_profile(model).values()) == pytest.approx([159.58] * 2, abs=0.01)
    model(**batch).loss.backward()
    with pytest.raises(hlg.FoldError, match="fold needs whole weights, which FSDP or DeepSpeed has cut up here: load what"):
        hlg.fold(model, batch)
    with pytest.raises(ValueError, match=r"saving needs whole weights.*get_model_state_dict"):
        hlg.save_relu_pretrained(model, tmp_path / "relu")
    assert not (tmp_path / "relu").exists()


def test_parts_that_only_an_engine_can_bring_together() -> None:
    """ZeRO-3 marks its parameters, FSDP1 wraps modules."""
    model = converted()
    batch = {"input_ids": Rows().tokens}
    parameter = model.classifier.weight
    parameter.ds_id = 0
    for refit in (hlg.harden, partial(hlg.relu_ize, compensate="least_squares")):
        with pytest.raises(ValueError, match=r"needs whole weights.*set_hardness along a HardeningSchedule"):
            refit(model, calibration=[batch])
    del parameter.ds_id
    model.wrapped = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(ValueError, match="needs whole weights"):
        hlg.harden(model, [batch])
