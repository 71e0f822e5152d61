"""What two processes do with a model that FSDP2 has cut up, case by case: `python -m support.sharded_work FOLDER`.

As in `team_work`, `CASES[name](0, 1)` does all of it in one process, with a model that is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.team import team_of
from hf_lambda_gelu.measurement.whole_blocks import whole_blocks
from hf_lambda_gelu.structure.shard_source import ShardSource
from hf_lambda_gelu.structure.sharding import is_sharded
from hf_lambda_gelu.surgery import substitution
from hf_lambda_gelu.surgery.refit import engine
from support import team_work
from support.calibration import calibration_set
from support.experts import experts_model
from support.models import converted
from support.states import hooks
from support.team_work import lively, plain, texts

BLOCKS = {"bert": "bert.encoder.layer", "vit": "vit.layers", "llama": "model.layers", "mixtral": "model.layers"}


def sharded(model: Any, size: int, blocks: str = "bert.encoder.layer", root: bool = True) -> Any:
    """Cut up, each of its layers and what is outside of them; left as it is for one process."""
    if size == 1:
        return model
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.get_submodule(blocks) if blocks else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) if root else model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights but λ, brought together."""
    if not is_sharded(model):
        found = model.state_dict()
    else:
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {k: v.detach().clone() for k, v in found.items() if not k.endswith("unclipped_hardness")}


def parts(model: Any) -> dict[str, Any]:
    """What must be as it was after a failure: this process's part of each weight, and what else belongs to the model."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    kept = {n: p.detach().to_local() if hasattr(p, "full_tensor") else p.detach() for n, p in model.named_parameters()}
    return {
        "values": {n: (part.numpy().tobytes(), part.data_ptr()) for n, part in kept.items()},
        "parameters": {n: (id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "hooks": hooks(model),
        "classes": [type(m).__name__ for m in model.modules()],
        "gates": {n: site.as_relu for n, site in hlg.hardness_sites(model).items()},
        "config": model.config.to_dict(),
    }


def outcome(model: Any, work: Callable[[], Any], batch: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """What is left of the work; after an error whether the model is as it was.

    Args:
        batch: runs the model through FSDP2 before, by which the root is whole when the work begins, and afterwards.
    """
    found: dict[str, Any] = {"error": None, "report": None}
    if batch is not None:
        found["logits before"] = logits(model, batch)  # the first forward, in which FSDP2 sets itself up
    before = parts(model)
    if batch is not None:
        logits(model, batch)
    try:
        found["report"] = plain(work())
    except BaseException as error:
        found |= {"error": (type(error).__name__, str(error)), "untouched": parts(model) == before}
    if batch is not None:
        found["logits"] = logits(model, batch)
    return found | {"weights": whole(model)}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits.clone()
    return found


def refit(model: Any, batches: Any, batch: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Any]:
    options = {"compensate": "least_squares", "processes": "all", **options}
    return outcome(model, lambda: hlg.relu_ize(model, calibration=batches, **options), batch)


def bert(rank: int, size: int) -> Any:
    """Four batches and three. It is noted, too, how many elements were brought together and there at most at a time.

    Those count that FSDP2 has by layers.
    """
    model = sharded(lively("bert-classifier"), size)
    inside = {name for name, p in model.named_parameters() if name.startswith("bert.encoder.layer") and p.numel() > 1}
    there: list[tuple[StorageWeakRef, int]] = []
    counts: list[int] = []
    load_all = ShardSource.load_all

    def counted(source: ShardSource, resting: Any) -> list[Tensor]:
        found = load_all(source, resting)
        names = [source._resting[tensor.data_ptr()][1][0] for tensor in resting]
        there.extend(
            (StorageWeakRef(t.untyped_storage()), t.numel()) for n, t in zip(names, found, strict=True) if n in inside
        )
        counts.append(sum(count for storage, count in there if not storage.expired()))
        return found

    ShardSource.load_all = counted  # type: ignore[method-assign]
    try:
        found = refit(model, texts()[rank::size], texts()[0], compute_metrics=team_work.accuracy)
    finally:
        ShardSource.load_all = load_all  # type: ignore[method-assign]
    block = sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    return found | {"most": max(counts, default=0), "times": sum(count > 0 for count in counts), "block": block}


def in_fp32(rank: int, size: int) -> Any:
    model = sharded(converted("bert-classifier"), size)
    return refit(model, texts()[rank::size], texts()[0])


def vit(rank: int, size: int) -> Any:
    """Its embeddings are cut up apart; the first process has no batch."""
    model = lively("vit")
    if size > 1:
        fully_shard(model.vit.embeddings, mesh=init_device_mesh("cpu", (size,)))
    batches = [{"pixel_values": batch["pixel_values"].double()} for batch in calibration_set(model, 6)]
    return refit(sharded(model, size, BLOCKS["vit"]), batches if rank == size - 1 else [], batches[0])


def replicated(rank: int, size: int) -> Any:
    """`llama` and `bert` by as many processes, each with a whole model."""
    model = lively("llama")
    batches = calibration_set(model, 12)
    return [refit(model, batches[rank::size]), refit(lively("bert-classifier"), texts()[rank::size])]


def llama(rank: int, size: int) -> Any:
    """The maps get biases."""
    model = lively("llama")
    batches = calibration_set(model, 12)
    found = refit(sharded(model, size, BLOCKS["llama"]), batches[rank::size], batches[0])
    return found | {"trained": {n: p.requires_grad for n, p in model.named_parameters()}}


def experts(rank: int, size: int) -> Any:
    """Each batch is of four tokens, which do not reach all experts; the root is not cut up."""
    model = experts_model("mixtral")
    batches = [{"input_ids": batch["input_ids"][:, :4]} for batch in calibration_set(model, 9)]
    return refit(sharded(model, size, BLOCKS["mixtral"], root=False), batches[rank::size], batches[0])


def hardened(rank: int, size: int) -> Any:
    """In the middle of a training loop, which goes on with the same optimizer."""
    model = sharded(lively("bert-classifier"), size).eval()
    optimizer = torch.optim.SGD(hlg.parameter_groups(model, 3.0), lr=0.01)
    batches = texts()

    def steps() -> None:
        for batch in batches[:2]:  # the same on every process, of which FSDP2 takes the mean
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps()
    found = outcome(model, lambda: hlg.harden(model, batches[rank::size], processes="all"))
    profile = hlg.hardness_profile(model)
    for site in hlg.hardness_sites(model).values():
        site.requires_grad_(False)
    steps()
    return found | {"profile": profile, "afterwards": whole(model)}


def cannot_be_replayed(rank: int, size: int) -> Any:
    """One process finds a block that cannot be run apart: all run the whole model, block by block."""
    with team_work.third_block_not_replayed(rank):
        return refit(sharded(lively("bert-classifier"), size), texts()[rank::size], compute_metrics=team_work.accuracy)


def measured(rank: int, size: int) -> Any:
    """The naive swap, measured; one process has no batch."""
    model, batches = sharded(lively("bert-classifier"), size), texts()
    return refit(model, batches if rank == size - 1 else [], batches[0], compensate=None, force=True)


def calibrated(rank: int, size: int) -> Any:
    model = sharded(lively("bert-classifier"), size)
    return hlg.calibrate(model, texts()[rank::size], processes="all").to_dict()


def one_runs(rank: int, size: int) -> Any:
    """One process runs the model twice, on its own; what it puts out."""
    model = sharded(lively("bert-classifier"), size).eval()
    team = team_of("all", model)
    with team.whole(), whole_blocks(model, team):
        return [logits(model, batch) for batch in texts()[: 2 * (rank == size - 1)]]


def bad_batch(rank: int, size: int) -> Any:
    """The second process's last batch holds a token that there is not."""
    batches = texts()[rank::size]
    if rank == 1:
        batches[-1] = {**batches[-1], "input_ids": torch.full_like(batches[-1]["input_ids"], 99)}
    return refit(sharded(lively("bert-classifier"), size), batches, texts()[0])


def stopped(rank: int, size: int) -> Any:
    """Ctrl-C on one of them, while the other one's forward asks for weights."""
    with _raising(engine, "main_output", KeyboardInterrupt(), rank == 1):
        return refit(sharded(lively("bert-classifier"), size), texts()[rank::size], texts()[0])


def at_the_end(rank: int, size: int) -> Any:
    """After all weights were written."""
    with _raising(substitution, "_attach_report", OSError("the last line"), rank == 1):
        return refit(sharded(lively("bert-classifier"), size), texts()[rank::size], texts()[0])


@contextmanager
def _raising(module: Any, name: str, error: BaseException, here: bool) -> Iterator[None]:
    function = getattr(module, name)

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    if here:
        setattr(module, name, raises)
    try:
        yield
    finally:
        setattr(module, name, function)


def alone(rank: int, size: int) -> Any:
    return refit(sharded(lively("bert-classifier"), size), texts(), processes="one")


def hinges(rank: int, size: int) -> Any:
    return refit(sharded(lively("bert-classifier"), size), texts()[rank::size], hinges=2)


def root_alone(rank: int, size: int) -> Any:
    """After a forward, by which FSDP2 has made all weights whole for a while."""
    model = sharded(lively("bert-classifier"), size, "")
    return refit(model, texts()[rank::size], texts()[0])


def two_dimensions(rank: int, size: int) -> Any:
    model = lively("bert-classifier")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return refit(fully_shard(model, mesh=mesh), texts()[rank::size])


CASES: dict[str, Callable[[int, int], Any]] = {
    case.__name__: case
    for case in (
        bert, in_fp32, vit, llama, replicated, experts, hardened, cannot_be_replayed, measured, calibrated, one_runs,
        bad_batch, stopped, at_the_end, alone, hinges, root_alone, two_dimensions,
    )
}  # fmt: skip


def _process(rank: int, ports: list[int], folder: Path) -> None:
    distributed.init_process_group("gloo")
    for name, case in CASES.items():
        torch.save(case(rank, team_work.SIZE), folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    team_work.start(_process, Path(sys.argv[1]))
