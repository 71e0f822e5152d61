"""Whatever loads a model, tokenizer or processor by name or folder has `trust_remote_code`, and it is False."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from transformers import HfArgumentParser

import hf_lambda_gelu as hlg
from hf_lambda_gelu.cli import app
from hf_lambda_gelu.training.trainer import LambdaGELUTrainer

ROOT = Path(hlg.__file__).parents[1]
# takes a path and loads no model, tokenizer or processor → why
LOADS_NOTHING = {
    "load_hardness": "reads numbers that lie beside adapters into a model that is there",
    "plot_hardness": "writes a picture; reads the JSON of a run",
    "save_with_code": "writes a model of transformers, and a file of this package",
}
# what users run of scripts/; the others take models by a list of their own (scripts/tools/assets)
SCRIPTS = ("finetune_text", "finetune_image", "relu_ize_lm", "predict_stock")


def takes_a_path(function: object) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    except ValueError:
        return False
    return any("PathLike" in str(p.annotation) or p.name in ("folder", "src", "repo_id") for p in parameters)


def verbs() -> dict[str, object]:
    """The public functions that take a folder or a name."""
    named = {name: getattr(hlg, name) for name in hlg.__all__}
    return {name: value for name, value in named.items() if inspect.isfunction(value) and takes_a_path(value)}


def test_verbs() -> None:
    found = verbs()
    assert set(found) > {"audit", "convert_checkpoint", "export_onnx", "push_relu_to_hub", "save_relu_pretrained"}
    assert set(LOADS_NOTHING) <= set(found)
    for name in set(found) - set(LOADS_NOTHING):
        parameter = inspect.signature(found[name]).parameters.get("trust_remote_code")  # type: ignore[arg-type]
        assert parameter is not None, f"{name} takes a folder and has no trust_remote_code"
        assert (parameter.default, parameter.kind) == (False, inspect.Parameter.KEYWORD_ONLY), name
        assert "trust_remote_code:" in str(inspect.getdoc(found[name])), f"{name} does not say what it does"
    for name in LOADS_NOTHING:
        assert "trust_remote_code" not in inspect.signature(found[name]).parameters  # type: ignore[arg-type]
    parameter = inspect.signature(LambdaGELUTrainer.push_to_hub).parameters["trust_remote_code"]
    assert parameter.default is False


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")  # type: ignore[arg-type]
        else:
            yield f"{path} {name}".strip(), command


def test_commands() -> None:
    found = dict(commands(typer.main.get_command(app)))  # type: ignore[arg-type]
    assert set(found) == {
        *("convert", "relu-ize", "distill", "fold", "audit", "calibrate", "sensitivity", "verify", "push"),
        *("export onnx", "demo"),
    }
    for name, command in found.items():
        option = {o: p for p in command.params for o in p.opts}.get("--trust-remote-code")
        assert option is not None, f"{name} loads a model and has no --trust-remote-code"
        assert option.default is False, name


def loads(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call that loads by transformers' Auto classes, and by a class that may be any."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            auto = called.endswith((".from_pretrained", ".from_config")) and not called.startswith("GenerationConfig")
            own = ("load_saved", "saved_class", *(("loaded", "processors") if path.parent.name == "cli" else ()))
            if auto or called in ("pipeline", *own):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {called}", node


def untrusting(sources: list[Path]) -> list[str]:
    """The loads that do not say whether they trust; an Auto class that is not told asks on stdin."""
    return [
        place
        for path in sources
        for place, node in loads(path)
        if not any(k.arg == "trust_remote_code" for k in node.keywords)
        and "trust" not in "".join(ast.unparse(argument) for argument in node.args)
    ]


# no code runs there: the class is at hand already → the calls
BY_A_CLASS = {"hf_lambda_gelu/structure/loading.py": 1, "hf_lambda_gelu/checkpoints/as_saved.py": 2}


def test_each_load_in_the_source() -> None:
    package = [path for path in sorted((ROOT / "hf_lambda_gelu").rglob("*.py")) if path.parent.name != "templates"]
    scripts = [ROOT / "scripts" / f"{name}.py" for name in SCRIPTS]
    assert sum(1 for path in [*package, *scripts] for _ in loads(path)) > 20
    found = untrusting([*package, *scripts])
    counted = {place.partition(":")[0]: 0 for place in found}
    for place in found:
        counted[place.partition(":")[0]] += 1
    assert counted == BY_A_CLASS, found


@pytest.mark.parametrize("line", ["AutoModel.from_pretrained(folder)", "load_saved(folder)", "pipeline('x', model=folder)"])
def test_a_load_without_it_is_found(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "new.py").write_text(line)
    assert len(untrusting([tmp_path / "new.py"])) == 1
    (tmp_path / "new.py").write_text(line.replace(")", ", trust_remote_code=trusted)"))
    assert untrusting([tmp_path / "new.py"]) == []


def test_scripts() -> None:
    from scripts import finetuning, relu_ize_lm

    for arguments in (finetuning.ModelArguments, relu_ize_lm.Arguments):
        options = {action.dest: action.default for action in HfArgumentParser(arguments)._actions}
        assert options["trust_remote_code"] is False
