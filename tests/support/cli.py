"""The command line in this process and in one of its own, and checkpoints and data for it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from PIL import Image
from transformers import BertTokenizer, PreTrainedModel, ViTImageProcessorPil
from typer.testing import CliRunner, Result

import hf_lambda_gelu as hlg
from hf_lambda_gelu.cli import app
from support import tiny
from support.hub_server import HubServer
from support.processes import module_in_fork

__all__ = ["HubServer", "answer", "bert", "checkpoint", "command", "files", "invoke", "sentences", "texts", "tiny", "vit"]

WORDS = [f"word{index}" for index in range(94)]


def invoke(*arguments: object, code: int = 0) -> Result:
    """A command in this process, which must end with that exit code and without a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="hf-lambda-gelu")
    assert result.exit_code == code, result.output[-3000:]
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    if code and not result.stdout:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert result.stderr.rstrip().endswith(errors[0]), "the last line says what went wrong"
    return result


def answer(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The object that a command prints with --json: all that is on stdout."""
    stdout = invoke(*arguments, "--json", code=code).stdout
    assert stdout.count("\n") == 1
    found = json.loads(stdout)
    assert isinstance(found, dict)
    return found


def command(*arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A command as a process of its own, started."""
    root = Path(hlg.__file__).parent.parent
    settings = {**(os.environ if env is None else env), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "hf_lambda_gelu.cli", *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings, cwd=cwd)


def forked(*arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> CompletedProcess[str]:
    """A command where transformers has been imported, run to its end."""
    return module_in_fork("hf_lambda_gelu.cli", *map(str, arguments), env=env, cwd=cwd)


def bert(folder: Path, name: str = "bert-classifier", hardness: float | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny BERT, λ-GELU if a hardness is given, saved with a tokenizer that knows `WORDS`; the model in memory."""
    model = checkpoint(folder, name, hardness, **overrides)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    return model


def vit(folder: Path, hardness: float | None = None) -> PreTrainedModel:
    """A tiny ViT and its image processor."""
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return checkpoint(folder, "vit", hardness)


def checkpoint(folder: Path, name: str, hardness: float | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny model of tests/tiny.py, saved."""
    model = tiny.build(name, **overrides)
    if hardness is not None:
        hlg.convert(model, hardness)
    model.save_pretrained(folder)
    return model


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of three to nine words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 9))) for _ in range(count)]


def texts(path: Path, count: int = 24, seed: int = 0) -> Path:
    """A text file with a line per example."""
    path.write_text("\n".join(sentences(count, seed)) + "\n", encoding="utf-8")
    return path


def pictures(folder: Path, count: int = 6) -> Path:
    """A folder of images, grey and colour."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for index in range(count):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).convert("L" if index % 2 else "RGB").save(folder / f"{index}.png")
    return folder


def files(folder: Path) -> list[str]:
    """All that is in a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
