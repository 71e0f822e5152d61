"""The penalty on what the gates let through, against loops by hand in float64, and runs that must not differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny
from support.training import Rows, StopAfterSaving, arguments, converted, logged
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, StableLmConfig, StableLmForCausalLM

import hf_lambda_gelu as hlg
from hf_lambda_gelu.training.sparsity_norms import NORMS
from hf_lambda_gelu.training.sparsity_penalty import check_penalisable

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Ragged(Rows):
    """Rows of other lengths each."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "input_ids": row["input_ids"][: 2 + (5 * index) % 10]}


def padded(rows: list[dict[str, Tensor]], more: int = 0) -> dict[str, Tensor]:
    """A batch, padded at the end to the longest row and by so many tokens more."""
    ids = pad_sequence([row["input_ids"] for row in rows] + [torch.zeros(more + 11, dtype=torch.long)], batch_first=True)[
        :-1
    ]
    length = max(len(row["input_ids"]) for row in rows) + more
    masks = torch.stack([torch.arange(length) < len(row["input_ids"]) for row in rows]).long()
    return {"input_ids": ids[:, :length], "attention_mask": masks, "labels": torch.stack([row["labels"] for row in rows])}


def trainer_of(
    folder: Path,
    model: PreTrainedModel | None = None,
    cls: type[hlg.LambdaGELUTrainer] = hlg.LambdaGELUTrainer,
    **changes: Any,
) -> hlg.LambdaGELUTrainer:
    """A trainer in float64, without dropout, on ragged rows."""
    loss = changes.pop("compute_loss_func", None)
    values = {"sparsity_penalty": 0.3, "max_grad_norm": 0.0, "max_steps": 3, **changes}
    return cls(
        model_of("bert-classifier") if model is None else model,
        arguments(folder, **values),
        train_dataset=Ragged(),
        eval_dataset=Ragged(16, 1),
        data_collator=padded,
        compute_loss_func=loss,
    )


def by_hand(model: PreTrainedModel, batch: dict[str, Tensor], norm: str, mask: Tensor) -> tuple[Tensor, float]:
    """The norm's mean over sites, examples and tokens, and the share of zeros: one loop for each of these words."""
    seen: list[Tensor] = []
    handles = [s.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for s in hlg.hardness_sites(model).values()]
    model(**batch)
    for handle in handles:
        handle.remove()
    by_site, zeros = [], []
    for z in seen:
        by_example = []
        for example in range(len(mask)):
            by_token = []
            for position in range(mask.shape[1]):
                if mask[example, position]:
                    r = list(z[example, position].clamp(min=0.0).unbind())
                    total, squares = sum(r), sum(value * value for value in r)
                    if norm == "hoyer":
                        by_token.append(total * total / (len(r) * squares))
                    else:
                        by_token.append(total / math.sqrt(len(r) * squares.item()))
                    zeros.append(sum(value.item() == 0 for value in r) / len(r) / int(mask[example].sum()))
            by_example.append(sum(by_token) / len(by_token))
        by_site.append(sum(by_example) / len(by_example))
    return sum(by_site) / len(by_site), sum(zeros) / len(seen) / len(mask)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_of(name: str) -> PreTrainedModel:
    if name == "stablelm":  # gated, and float64 but for its loss
        torch.manual_seed(0)
        model = StableLmForCausalLM(StableLmConfig(**tiny.GATED))
    else:
        model = tiny.build(name, **NO_DROPOUT)
    hlg.convert(model, 1.3)
    return model.double()


def masked(rows: list[dict[str, Tensor]], more: int = 0) -> dict[str, Tensor]:
    """As `padded`, with every token as its own label."""
    batch = padded(rows, more)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("norm", ["hoyer", "l1"])
@pytest.mark.parametrize("name", ["bert-classifier", "stablelm"])
def test_the_gradient_is_that_of_loss_and_penalty_by_hand(tmp_path: Path, name: str, norm: str) -> None:
    """Also of a gated FFN, where the penalty is on the gate; the value of the loss and of the evaluation stay the task's."""
    model = model_of(name)
    batch = (masked if name == "stablelm" else padded)([Ragged()[i] for i in range(4)])
    items = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()} if name == "stablelm" else {}
    loss = model(**batch, **items).loss
    penalty, zeros = by_hand(model, batch, norm, batch["attention_mask"])
    (loss + 0.3 * penalty).backward()
    expected = gradients(model)
    model.zero_grad()

    trainer = trainer_of(tmp_path, model, sparsity_norm=norm)
    trainer.callback_handler.train_dataloader = [batch]
    trainer._sites_run = True
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batches, items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    found = trainer.training_step(model, batches[0], items)
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    assert gradients(model).keys() == expected.keys()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert logs["sparsity/penalty"] == pytest.approx(0.3 * penalty.item(), rel=1e-9)
    assert logs["sparsity/zeros"] == pytest.approx(zeros, rel=1e-9)
    with torch.no_grad():
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(loss.item(), rel=1e-12)


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Five more tokens of padding change no gradient."""
    found = []
    for more in (0, 5):
        trainer = trainer_of(tmp_path, sparsity_penalty=10.0)
        trainer.data_collator = lambda rows, more=more: padded(rows, more)
        trainer.train()
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-11)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    assert num_items_in_batch is not None  # the Trainer always has it in training
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("case", ["masked", "smoothed", "own", "mean"])
def test_accumulated_batches_are_one_batch(tmp_path: Path, case: str) -> None:
    """2 × 4 examples are 1 × 8, of lengths that differ, and at the end of an epoch 4 and 2 are 6.

    The loss is the model's by `num_items_in_batch`, the label smoother's, a function's, or a mean that Trainer divides.
    """
    changes: dict[str, Any] = {"smoothed": {"label_smoothing_factor": 0.1}, "own": {"compute_loss_func": own_loss}}.get(
        case, {}
    )
    found = []
    for size, count in ((8, 1), (4, 2)):
        changes |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 4}
        model = model_of("stablelm" if case == "masked" else "bert-classifier")
        trainer = trainer_of(tmp_path, model, sparsity_penalty=3.0, hardness_compensate="none", **changes)
        trainer.train_dataset = Ragged(32 if case == "mean" else 30)
        if case == "masked":
            trainer.data_collator = masked
        elif case == "mean":
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
        found.append((trainer.model.state_dict(), logged(trainer, "sparsity/penalty"), logged(trainer)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-8, atol=1e-10)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-8)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-6)  # Trainer logs in fp32


def test_checkpointed_gradients_are_the_others(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = trainer_of(tmp_path, sparsity_penalty=3.0)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.train()
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_none_is_none(tmp_path: Path) -> None:
    """Without a penalty, there are no hooks within a step; with one, none after it, whatever was raised."""
    hooks: list[int] = []

    class Watched(hlg.LambdaGELUTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            def count(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
                hooks.append(sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.model.modules()))
                if len(hooks) > 2:
                    raise KeyboardInterrupt
                return own_loss(outputs, labels, num_items_in_batch)

            self.compute_loss_func = count
            return super().compute_loss(*args, **kwargs)

    states = []
    for changes in ({}, {"sparsity_penalty": 0.0}, {"sparsity_penalty": 0.0, "sparsity_norm": "l1"}):
        trainer = hlg.LambdaGELUTrainer(converted(), arguments(tmp_path, max_steps=3, **changes), train_dataset=Rows())
        trainer.train()
        states.append(trainer.model.state_dict())
        assert not any(key.startswith("sparsity") for entry in trainer.state.log_history for key in entry)
    assert all(torch.equal(value, state[name]) for state in states[1:] for name, value in states[0].items())

    for weight in (0.0, 1.0):
        hooks.clear()
        trainer = trainer_of(tmp_path, cls=Watched, sparsity_penalty=weight)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert hooks[0] == 0  # the first run shows that the sites are what runs
        assert (hooks[2] > 0) == (weight > 0)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.model.modules())


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    """To the bit: the penalty has no state."""
    changes: dict[str, Any] = {"max_steps": 6, "sparsity_penalty": 3.0, "save_strategy": "steps", "save_steps": 2}
    twin = trainer_of(tmp_path / "twin", **changes)
    twin.train()
    stopped = trainer_of(tmp_path / "run", **changes)
    stopped.add_callback(StopAfterSaving(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(value, twin.model.state_dict()[name]) for name, value in resumed.model.state_dict().items())
    assert logged(resumed, "sparsity/penalty") == logged(twin, "sparsity/penalty")


def test_it_makes_zeros(tmp_path: Path) -> None:
    """In a run that nothing else tells from its twin, the ReLU network has more of them, and fewer with more weight."""
    zeros = []
    for weight in (0.0, 3.0, 30.0):
        trainer = trainer_of(tmp_path, sparsity_penalty=weight, max_steps=20, learning_rate=3e-3)
        trainer.train()
        hlg.relu_ize(trainer.model)
        zeros.append(hlg.activation_sparsity(trainer.model, [padded([Ragged()[i] for i in range(32)])]).zeros)
    assert zeros[0] + 0.02 < zeros[1] < zeros[2] - 0.02


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_in_fp32(norm: str, dtype: torch.dtype) -> None:
    """Of 3,000 units in half precision too, whose own sums would be off by a percent; rows that do not fire are 0."""
    torch.manual_seed(0)
    z = torch.randn(5, 3000).to(dtype)
    z[4] = -1.0
    given, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    found, expected = NORMS[norm](given), NORMS[norm](exact)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert float(found[4]) == 0.0
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-2, atol=1e-7)
    assert torch.equal(given.grad[4], torch.zeros_like(given.grad[4]))


@pytest.mark.parametrize("norm", NORMS)
def test_one_weight_means_the_same_at_any_width_and_scale(norm: str) -> None:
    """A layer that is repeated, or scaled, has the same norm."""
    z = torch.randn(7, 40, dtype=torch.float64)
    measure: Callable[[Tensor], Tensor] = NORMS[norm]
    for same in (z.repeat(1, 10), 1e3 * z, 1e-3 * z):
        torch.testing.assert_close(measure(same), measure(z), rtol=1e-9, atol=0)
    assert float(measure(torch.ones(1, 64))) == pytest.approx(1.0)


@pytest.mark.parametrize("case", ["bf16", "adapters"])
def test_it_goes_with(tmp_path: Path, case: str) -> None:
    """Under autocast the penalty is that of float64 but for the rounding of z; adapters of LoRA learn from it too."""
    runs = {}
    for kind, weight in (("plain", 3.0), (case, 3.0), (case, 0.0)):
        model: Any = model_of("bert-classifier")
        if kind == "bf16":
            model = model.float()
        elif kind == "adapters":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=["dense"], init_lora_weights=False)).double()
        changes = {"bf16": kind == "bf16", "sparsity_penalty": weight, "hardness_compensate": "none", "max_steps": 1}
        runs[kind, weight] = trainer_of(tmp_path, model, **changes)
        runs[kind, weight].train()
    with_it, without = (runs[case, weight].model.state_dict() for weight in (3.0, 0.0))
    changed = [name for name, value in with_it.items() if not torch.equal(value, without[name])]
    assert any("intermediate.dense" in name for name in changed)
    if case == "bf16":
        first, second = (logged(runs[key, 3.0], "sparsity/penalty")[1] for key in ("plain", case))
        assert second == pytest.approx(first, rel=5e-3)
        assert second != first


class OwnLoss(hlg.LambdaGELUTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


@pytest.mark.parametrize(
    ("changes", "cls", "expected"),
    [
        ({"sparsity_penalty": -0.1}, hlg.LambdaGELUTrainer, r"sparsity_penalty must be a finite number >= 0, got -0\.1"),
        ({"sparsity_penalty": math.nan}, hlg.LambdaGELUTrainer, r"sparsity_penalty must be .*, got nan"),
        ({"sparsity_penalty": math.inf}, hlg.LambdaGELUTrainer, r"sparsity_penalty must be .*, got inf"),
        ({"sparsity_norm": "l2"}, hlg.LambdaGELUTrainer, r"unknown sparsity_norm 'l2': expected 'hoyer' or 'l1'"),
        ({"torch_compile": True}, hlg.LambdaGELUTrainer, r"does not go with torch\.compile.*train without torch_compile"),
        ({}, OwnLoss, r"this trainer's own does not call it: call super\(\)\.compute_loss"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], cls: type[hlg.LambdaGELUTrainer], expected: str) -> None:
    model = converted().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=expected):
        trainer_of(tmp_path, model, cls, **changes).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in hlg.hardness_sites(model).values())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("_n_gpu", 2, r"sparsity_penalty=0\.3 does not go with torch\.nn\.DataParallel.*by torchrun"),
        ("fsdp", True, r"does not go with FSDP and DeepSpeed.*train by DistributedDataParallel"),
        ("deepspeed", "zero.json", r"does not go with FSDP and DeepSpeed.*train by DistributedDataParallel"),
        ("compiled", True, r"does not go with torch\.compile"),
    ],
)
def test_refused_where_it_was_not_made_for(tmp_path: Path, name: str, value: Any, expected: str) -> None:
    """By the arguments as the trainer finds them: there are no two devices here."""
    args, model = arguments(tmp_path, sparsity_penalty=0.3), converted()
    assert args.n_gpu < 2  # sets it up
    check_penalisable(args, model)
    setattr(args, name, value)
    if name == "compiled":
        model.compile()
    with pytest.raises(ValueError, match=expected):
        check_penalisable(args, model)


def test_refused_where_it_has_no_gradient(tmp_path: Path) -> None:
    """A model whose head alone is trained, and one that checkpoints in the reentrant way, unknown to the arguments."""
    frozen = converted().double()
    frozen.bert.requires_grad_(False)
    with pytest.raises(ValueError, match=r"sparsity_penalty reaches nothing that is trained"):
        trainer_of(tmp_path, frozen).train()
    reentrant = converted().double()
    reentrant.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"reentrant gradient checkpointing.*set use_reentrant=False"):
        trainer_of(tmp_path, reentrant).train()
