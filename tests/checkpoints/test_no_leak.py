"""No secret and no folder of the machine reaches a card or its record, whoever hands them over."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import relu_model

import hf_lambda_gelu as hlg
from hf_lambda_gelu.checkpoints.card import write_record
from hf_lambda_gelu.checkpoints.redaction import cleaned_command, cleaned_text, stated_command
from scripts.finetuning import DataArguments, command_line

SECRET = "Xq7secretvalue"
HUB_TOKEN = "hf_" + "aBc4" * 8
COMMANDS = {
    "equals": f"python train.py --wandb_api_key={SECRET} --seed 4",
    "apart": f"python train.py --auth-token {SECRET} --seed 4",
    "one dash": f"python train.py -token {SECRET} --seed 4",
    "quoted": f"python train.py --password 'a {SECRET}' --seed 4",
    "quoted as a whole": f'python train.py "--client_secret=a {SECRET}" --seed 4',
    "next line": f"python train.py --push_to_hub_token \\\n    {SECRET} \\\n    --seed 4",
    "variable": f"export AWS_SECRET_ACCESS_KEY={SECRET} OTHER=1 python train.py --seed 4",
    "hydra": f"python train.py +logger.api_key={SECRET} --seed 4",
    "mapping": f'python train.py --logger \'{{"api_key": "{SECRET}", "name": "x"}}\' --seed 4',
    "address": f"python train.py --data https://me:{SECRET}@example.org/d --seed 4",
    "query": f"python train.py --data 'https://example.org/x?a=1&access_token={SECRET}&b=2' --seed 4",
    "header": f"python train.py --header='Authorization: Bearer {SECRET}' --seed 4",
    "other header": f"python train.py -H 'X-Api-Key: {SECRET}' --seed 4",
    "within": f"python train.py --set=api_key={SECRET} --opts a=1,token={SECRET};auth={SECRET} --seed 4",
    "colons": f"python train.py --api-key:{SECRET} --kwargs api_key:{SECRET} --kw '{{ api_key: {SECRET} }}' --seed 4",
    "other names": f"python train.py --auth {SECRET} --pwd {SECRET} --bearer={SECRET} --api_keys {SECRET} --seed 4",
    "by its form": f"python train.py --note {HUB_TOKEN} --seed 4",
}
PATHS = {
    "equals": "python train.py --train_file=/srv/private/rows.json",
    "apart": "python /srv/private/train.py --train_file /srv/private/more/rows.json",
    "blank": "python train.py --train_file '/srv/private/my data/rows.json'",
    "escaped": "python train.py --train_file /srv/private/my\\ data/rows.json",
    "list": "python train.py --files=/srv/private/a.json,/srv/private/rows.json",
    "address": "python train.py --train_file file:///srv/private/rows.json",
    "drive": r"python train.py --train_file D:\srv\private\rows.json",
    "short option": "python train.py --seed 0 -f/srv/private/rows.json '-g/srv/private/my rows.json'",
    "share": r"python train.py --train_file \\srv\private\rows.json",
}


def written(folder: Path, **details: Any) -> str:
    """All that a save writes as text."""
    hlg.save_relu_pretrained(relu_model("bert-classifier"), folder, details=hlg.CardDetails(**details))
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in ("README.md", "lambda_gelu.json"))


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_secret_in_a_command(command: str) -> None:
    cleaned = cleaned_command(command)
    assert SECRET not in cleaned
    assert HUB_TOKEN not in cleaned
    assert cleaned.endswith("--seed 4")
    assert "python train.py" in cleaned


@pytest.mark.parametrize("command", PATHS.values(), ids=PATHS)
def test_path_in_a_command(command: str) -> None:
    cleaned = cleaned_command(command)
    assert "private" not in cleaned
    assert "rows.json" in cleaned
    assert cleaned.startswith("python train.py --")


@pytest.mark.parametrize(
    "text",
    [
        "python scripts/finetune_text.py \\\n    --seed 0 --tokenizer_name you/bert --chat_tokens 512 --key",
        "GELU/SiLU at 1 / 2, see https://huggingface.co/you/model and hf_lambda_gelu 0.2",
        "model = x Φ(λx); key: value; </b>",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert cleaned_text(text) == text
    assert cleaned_command(text.removesuffix(" --key")) == text.removesuffix(" --key")


def test_card_and_record(tmp_path: Path) -> None:
    """Command, arguments within arguments, notes, names: all of it, in both files."""
    text = written(
        tmp_path / "m",
        command="\n".join([*COMMANDS.values(), *PATHS.values()]),
        arguments={
            "hub_token": SECRET,
            "logger": {"apikey": SECRET, "folder": Path("/srv/private/runs one")},
            "files": ["/srv/private/rows.json"],
            "/srv/private/by name": {f"it's {HUB_TOKEN}": 1},
            "said": f"--hub_token {SECRET}",
            "learning_rate": np.float32(0.5),
            "steps": torch.tensor(7),
            "tokenizer": "kept",
        },
        notes=f"From `/srv/private/rows.json`, by {HUB_TOKEN}.",
        base_model="/srv/private/bert",
        dataset="/srv/private/reviews",
        results={f"at /srv/private/x by {HUB_TOKEN}": {"accuracy": 0.5}},
        final=f"at /srv/private/x by {HUB_TOKEN}",
    )
    for hidden in (SECRET, HUB_TOKEN, "private", "srv"):
        assert hidden not in text, hidden
    record = json.loads((tmp_path / "m" / "lambda_gelu.json").read_text())["details"]
    assert record["arguments"] == {
        "logger": {"folder": "runs one"},
        "files": ["rows.json"],
        "by name": {"it's hf_…": 1},
        "said": "",
        "learning_rate": 0.5,
        "steps": 7,
        "tokenizer": "kept",
    }
    assert "From `rows.json`, by hf_…." in text
    assert "**at x by hf_…**" in text


def test_record_of_somebody_else(tmp_path: Path) -> None:
    """A record of before, which has the token, loses it when it is written anew; site names with such words stay."""
    record = {"details": {"command": f"x --hub_token {SECRET}"}, "learned_hardness": {"layer.key": 2.0}, "other": HUB_TOKEN}
    write_record(tmp_path, record)
    found = json.loads((tmp_path / "lambda_gelu.json").read_text())
    assert found["details"]["command"] == "x"
    assert found["learned_hardness"] == {"layer.key": 2.0}
    assert found["other"] == "hf_…"
    assert [path.name for path in tmp_path.iterdir()] == ["lambda_gelu.json"]


def test_only_listed_options_are_stated() -> None:
    words = [
        "/srv/private/run.json",
        "--mystery",
        SECRET,
        "--seed=4",
        "--run-key",
        SECRET,
        SECRET,
        "--no_bf16",
        "--lr",
        "-1",
    ]
    command = stated_command("python -m x", words, {"seed", "bf16", "lr", "run_key"})
    assert command == "python -m x run.json --seed=4 --no_bf16 --lr -1"


@pytest.mark.parametrize(
    "given", [["--hub_token", SECRET], [f"--hub-token={SECRET}"], [f"--hub_to={SECRET}"], ["--run_name", SECRET]]
)
def test_command_line_of_the_scripts(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse takes abbreviations too; what no list names is left out, with its value."""
    words = [
        "--learning_rate",
        "1e-4",
        *given,
        "--train_file=/srv/private/rows.json",
        "--hardness_switch_point=0.5",
        "--activation",
        "relu",
    ]
    monkeypatch.setattr(sys, "argv", ["/srv/private/scripts/finetune_text.py", *words])
    stated = "--learning_rate 1e-4 --train_file=rows.json --hardness_switch_point=0.5 --activation relu"
    assert command_line(DataArguments()) == f"python -m scripts.finetune_text {stated}"


@pytest.mark.parametrize("value", [np.float32(0.75), np.int64(3), torch.tensor(0.75), torch.tensor([0.75])])
def test_results_of_numpy_and_torch(value: Any, tmp_path: Path) -> None:
    text = written(tmp_path / "m", results={"ReLU": {"f1": value}}, final="ReLU")
    assert json.loads((tmp_path / "m" / "lambda_gelu.json").read_text())["details"]["results"] == {
        "ReLU": {"f1": float(value)}
    }
    assert f"| **ReLU** | {float(value):.4f} |" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float64("nan"), torch.tensor(math.nan), None, "good"])
def test_results_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"results\['ReLU'\]\['f1'\] = .*expected a finite number"):
        hlg.CardDetails(results={"ReLU": {"f1": value}})
