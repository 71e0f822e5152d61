"""The examples that `push_to_hub` proves a trained model by: the trainer's own, where forward takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch.utils.data import IterableDataset

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training import publish
from hf_lambda_gelu.training.proof_inputs import own_examples

ROWS = [{"input_ids": torch.arange(8) + i, "labels": i % 2, "name": "a column"} for i in range(9)]


def trainer_of(folder: Path, kind: str = "bert-classifier", cls: Any = hlg.LambdaGELUTrainer, **sets: Any) -> Any:
    model = tiny.build(kind)
    hlg.convert(model)
    args = hlg.LambdaGELUTrainingArguments(str(folder), report_to="none", use_cpu=True, max_steps=1)
    return cls(model, args, **sets)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ROWS


@pytest.mark.parametrize(
    ("sets", "first"),
    [
        ({"eval_dataset": ROWS[1:], "train_dataset": ROWS}, 1),
        ({"eval_dataset": {"one": ROWS[2:], "other": ROWS}}, 2),
        ({"train_dataset": ROWS}, 0),
        ({"eval_dataset": Stream(), "train_dataset": ROWS[1:]}, 0),
        ({"eval_dataset": [], "train_dataset": ROWS[3:4]}, 3),
    ],
)
def test_the_first_examples(sets: dict[str, Any], first: int, tmp_path: Path) -> None:
    """Four of the evaluation set, or of the training set, without labels; as the collator makes them."""
    trainer = trainer_of(tmp_path, **sets)
    before = torch.get_rng_state()
    found = own_examples(trainer, trainer.model)
    assert found is not None
    assert list(found) == ["input_ids"]
    count = min(4, 9 - first) if first != 3 else 1
    assert torch.equal(found["input_ids"], torch.stack([torch.arange(8) + first + i for i in range(count)]))
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_that_the_decoder_needs(tmp_path: Path) -> None:
    """T5 makes its decoder's input of the labels, so that they stay."""
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(5)}] * 2
    trainer = trainer_of(tmp_path, "t5", train_dataset=rows)
    trainer.model.config.decoder_start_token_id = 0
    found = own_examples(trainer, trainer.model)
    assert found is not None
    assert found.keys() == {"input_ids", "labels"}


class Pairs(hlg.LambdaGELUTrainer):
    """Batches that forward does not take as they are."""

    def calibration_inputs(self, batch: Any) -> Iterator[Any]:
        yield {"input_ids": batch["query"]}


def test_batches_of_ones_own(tmp_path: Path) -> None:
    """`calibration_inputs` says what forward takes; without it there is nothing, and nothing is raised."""
    rows = [{"query": torch.arange(5)}] * 2
    trainer = trainer_of(tmp_path, cls=Pairs, train_dataset=rows)
    trainer.args.remove_unused_columns = False
    found = own_examples(trainer, trainer.model)
    assert found is not None
    assert found["input_ids"].shape == (2, 5)
    trainer = trainer_of(tmp_path, train_dataset=rows)
    trainer.args.remove_unused_columns = False
    assert own_examples(trainer, trainer.model) is None
    trainer.data_collator = lambda rows: 1 / 0
    assert own_examples(trainer, trainer.model) is None
    assert own_examples(trainer, torch.nn.Linear(1, 1)) is None


def test_inputs_that_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`inputs=` goes to the proof as it is; else the trainer's own do."""
    passed: list[Any] = []
    monkeypatch.setattr(publish, "push_relu_to_hub", lambda *_, inputs, **__: passed.append(inputs))
    trainer = trainer_of(tmp_path, train_dataset=ROWS)
    for site in hlg.hardness_sites(trainer.model).values():
        site.set_hardness(1e6)
    trainer.hub_model_id = "you/model"
    given = {"input_ids": torch.arange(3)[None]}
    trainer.push_to_hub(inputs=given)
    trainer.push_to_hub()
    assert passed[0] is given
    assert passed[1]["input_ids"].shape == (4, 8)
