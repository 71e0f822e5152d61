"""What two processes of a gloo group do together, case by case: `python -m support.team_work FOLDER` writes it down.

A case is a function of (rank, size), so that one process can do all of it for comparison: `CASES[name](0, 1)`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import hf_lambda_gelu as hlg
from hf_lambda_gelu.surgery.refit import engine
from hf_lambda_gelu.surgery.refit.runs import ReplayError
from support import cli
from support.calibration import calibration_set, labelled
from support.experts import experts_model
from support.models import converted
from support.states import full_snapshot, parameters

SIZE = 2
# options of relu-ize that several processes cannot share
REFUSED: list[list[object]] = [["--force"], ["--stream", "--calibration", "texts.txt"], ["--hinges", "4", "--force"]]
Batches = list[dict[str, Tensor]]
Work = Callable[[int, list[int], Path], None]


def outcome(model: PreTrainedModel, work: Callable[[], Any]) -> dict[str, Any]:
    """What is left of the work: weights, report and error, and whether after an error the model is as it was."""
    before = full_snapshot(model)
    found: dict[str, Any] = {"error": None, "report": None}
    try:
        found["report"] = plain(work())
    except BaseException as error:
        found |= {"error": (type(error).__name__, str(error)), "untouched": full_snapshot(model) == before}
    return found | {"weights": parameters(model)}


def plain(report: Any) -> Any:
    """The report without the seconds, which differ."""
    values = report.to_dict()
    for part in (values, values.get("compensation") or {}):
        part.pop("seconds", None)
    return values


def refit(model: PreTrainedModel, batches: Any, **options: Any) -> dict[str, Any]:
    options = {"compensate": "least_squares", "processes": "all", **options}
    return outcome(model, lambda: hlg.relu_ize(model, calibration=batches, **options))


def lively(name: str) -> PreTrainedModel:
    """With pre-activations large enough that the gates matter; in fp64, where little is left of another order of sums."""
    model = converted(name, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def texts(count: int = 7) -> Batches:
    """Batches of one and of two examples, with padding and labels."""
    batches = calibration_set(converted("bert-classifier"), count, padded=True)
    return [{**batch, "labels": labelled(seed)["labels"][: len(batch["input_ids"])]} for seed, batch in enumerate(batches)]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def bert(rank: int, size: int) -> Any:
    """Four batches and three."""
    return refit(lively("bert-classifier"), texts()[rank::size], compute_metrics=accuracy)


def vit(rank: int, size: int) -> Any:
    model = lively("vit")
    batches = [{"pixel_values": batch["pixel_values"].double()} for batch in calibration_set(model, 6)]
    return refit(model, batches[rank::size])


def llama(rank: int, size: int) -> Any:
    """A quarter more units; the share of the first process is twice as large."""
    model = lively("llama")
    batches = calibration_set(model, 12)
    dealt = [[b for i, b in enumerate(batches) if i >= 8 or i % 2 == 0], batches[1:8:2]]
    return refit(model, dealt[rank] if size > 1 else batches, budget=1.25)


def empty_share(rank: int, size: int) -> Any:
    """Two hinges per neuron, and the first process has no batch."""
    model = converted("bert-classifier", dtype=torch.float64)
    batches = calibration_set(model, 12)
    return refit(model, batches if rank == size - 1 else [], hinges=2)


def experts(rank: int, size: int) -> Any:
    """Each batch is of four tokens, which do not reach all experts."""
    model = experts_model("mixtral")  # in fp32: torch has no products of experts in fp64
    batches = [{"input_ids": batch["input_ids"][:, :4]} for batch in calibration_set(model, 9)]
    return refit(model, batches[rank::size])


def minimax(rank: int, size: int) -> Any:
    """Minimax hinges, whose change alone is measured."""
    model = lively("bert-classifier")
    return refit(model, texts()[rank::size], compensate=None, hinges=4)


def measured(rank: int, size: int) -> Any:
    """The naive swap, measured; one process has no batch."""
    batches = texts()
    return refit(lively("bert-classifier"), batches if rank == size - 1 else [], compensate=None, force=True)


def hardened(rank: int, size: int) -> Any:
    model = lively("bert-classifier")
    return outcome(model, lambda: hlg.harden(model, texts()[rank::size], processes="all"))


def calibrated(rank: int, size: int) -> Any:
    model = lively("bert-classifier")
    report = hlg.calibrate(model, texts()[rank::size], processes="all")
    return report.to_dict(), [site.histogram for site in report.sites]


@contextmanager
def third_block_not_replayed(rank: int) -> Iterator[None]:
    """The second process finds that its third block cannot be run apart."""
    observe = engine.observe
    calls: list[None] = []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if rank == 1 and len(calls) == 3:
            raise ReplayError("on purpose")
        return observe(*args, **kwargs)

    engine.observe = fails_once
    try:
        yield
    finally:
        engine.observe = observe


def cannot_be_replayed(rank: int, size: int) -> Any:
    """One process finds a block that cannot be run apart: all run the whole model."""
    with third_block_not_replayed(rank):
        return refit(lively("bert-classifier"), texts()[rank::size], compute_metrics=accuracy)


def broken_loader(rank: int, size: int) -> Any:
    def loader() -> Iterator[Any]:
        yield from texts(2)[rank::size]
        if rank == 1:
            raise OSError("the disk is gone")

    return refit(lively("bert-classifier"), loader())


def bad_batch(rank: int, size: int) -> Any:
    """The second process's last batch holds a token that there is not."""
    batches = texts()[rank::size]
    if rank == 1:
        batches[-1] = {**batches[-1], "input_ids": torch.full_like(batches[-1]["input_ids"], 99)}
    return refit(lively("bert-classifier"), batches)


def stopped(rank: int, size: int) -> Any:
    """Ctrl-C on one of them, once a site is refit."""
    describe = engine.describe

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    if rank == 0:
        engine.describe = stop
    try:
        return refit(lively("bert-classifier"), texts()[rank::size])
    finally:
        engine.describe = describe


def soft(rank: int, size: int) -> Any:
    """All of them raise by themselves."""
    return refit(lively("bert-classifier"), texts()[rank::size], compensate=None)


def same_batches(rank: int, size: int) -> Any:
    return refit(lively("bert-classifier"), texts())


def other_weights(rank: int, size: int) -> Any:
    model = lively("bert-classifier")
    if rank:
        model.classifier.weight.data[0, 0] += 1.0
    return refit(model, texts()[rank::size])


def other_options(rank: int, size: int) -> Any:
    return refit(lively("bert-classifier"), texts()[rank::size], compensate="bias" if rank else "least_squares")


def not_said(rank: int, size: int) -> Any:
    return refit(lively("bert-classifier"), texts(), processes=None)


def unknown(rank: int, size: int) -> Any:
    return refit(lively("bert-classifier"), texts(), processes="two")


def first_alone(rank: int, size: int) -> Any:
    """A script in which the first process alone calls."""
    model = lively("bert-classifier")
    return refit(model, texts(), processes="one", compute_metrics=accuracy) if rank == 0 else None


def with_accelerate(rank: int, size: int) -> Any:
    """Seven batches of which the last has one example, by accelerate's loaders; by default it repeats some."""
    rows = [{k: v[i] for k, v in batch.items()} for batch in texts() for i in range(len(batch["labels"]))]
    found = []
    for even in (True, False):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=even))
        loader = DataLoader(rows[:11], batch_size=2)
        found.append(refit(lively("bert-classifier"), accelerator.prepare(loader) if size > 1 else loader))
    return found


def command(rank: int, size: int) -> Any:
    """The command line, for which torchrun has started two processes; what each prints, and the weights that are saved."""
    folder = Path(os.environ["TEAM_WORK_FOLDER"])
    options = ["--compensate", "least_squares", "--calibration", folder / "texts.txt", "--batch-size", 4]
    done = cli.invoke("relu-ize", folder / "src", folder / "relu", *options)
    wrong = REFUSED if size > 1 else []
    refused = [cli.invoke("relu-ize", folder / "src", folder / "other", *o, code=2).stderr for o in wrong]
    return done.stdout, load_file(folder / "relu" / "model.safetensors") if rank == 0 else {}, refused


def checkpoint(folder: Path) -> None:
    """What `command` works on."""
    cli.bert(folder / "src", hardness=1.0)
    cli.texts(folder / "texts.txt", 20)


def killed(rank: int, size: int) -> Any:
    """The second process is gone in the middle of it: the last case."""
    if rank == 1:
        engine.observe = lambda *args, **kwargs: os._exit(0)
    return refit(lively("bert-classifier"), texts()[rank::size])


CASES: dict[str, Callable[[int, int], Any]] = {
    case.__name__: case
    for case in (
        bert, vit, llama, empty_share, experts, minimax, measured, hardened, calibrated, cannot_be_replayed,
        broken_loader, bad_batch, stopped, soft, same_batches, other_weights, other_options, not_said, unknown, first_alone,
        with_accelerate, killed,
    )
}  # fmt: skip


def _work(rank: int, ports: list[int], folder: Path) -> None:
    early = refit(lively("bert-classifier"), texts())  # no group yet
    torch.save(early, folder / f"early-{rank}.pt")
    torch.save(command(rank, SIZE), folder / f"command-{rank}.pt")  # it makes and ends a group of its own
    os.environ["MASTER_PORT"] = str(ports[1])
    distributed.init_process_group("gloo")
    for name, case in CASES.items():
        torch.save(case(rank, SIZE), folder / f"{name}-{rank}.pt")


def _process(work: Work, rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    os.environ |= {"WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    os.environ |= {"TEAM_WORK_FOLDER": str(folder)}
    try:
        work(rank, ports, folder)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(0)  # of a group that has lost one nothing can be taken down


def start(work: Work, folder: Path) -> None:
    """Let two processes do it, as torchrun would start them; `work` gets the rank, two free ports and the folder."""
    with socket.socket() as free, socket.socket() as other:
        for one in (free, other):
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (free, other)]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_process, args=(work, rank, ports, folder)) for rank in range(SIZE)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        if process.is_alive():
            process.kill()
            sys.exit("a process waits for another")


if __name__ == "__main__":
    checkpoint(Path(sys.argv[1]))
    start(_work, Path(sys.argv[1]))
