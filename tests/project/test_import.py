"""`import hf_lambda_gelu` registers and loads nothing heavy; every public name comes when it is asked for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import in_fork

import hf_lambda_gelu as hlg

# what models, training, data sets and plots bring
HEAVY = (
    "datasets",
    "evaluate",
    "matplotlib",
    "onnx",
    "pandas",
    "peft",
    "pyarrow",
    "scipy",
    "sklearn",
    "tokenizers",
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.training_args",
)


def fresh(code: str) -> str:
    """What `code` prints in an interpreter that has imported nothing."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """Of one fresh interpreter: `sys.modules` before and after the import, what `dir` shows, and one activation at 1."""
    code = """
import torch, transformers.activations, json, sys
before = sorted(sys.modules)
import hf_lambda_gelu
after, shown = sorted(sys.modules), dir(hf_lambda_gelu)
activation = transformers.activations.ACT2FN["lambda_gelu"]
made = [type(activation).__name__, activation(torch.tensor(1.0)).item()]
print(json.dumps({"before": before, "after": after, "dir": shown, "made": made}))
"""
    found: dict[str, Any] = json.loads(fresh(code))
    return found


def test_loads_nothing_heavy(imported: dict[str, Any]) -> None:
    loaded = set(imported["after"]) - set(imported["before"])
    assert not set(HEAVY) & loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("hf_lambda_gelu.")}
    assert rooms <= {"activation", "reports", "_compat"}
    # beyond torch and transformers' activations there is this package, and one small module of transformers
    others = {name for name in loaded if name.partition(".")[0] not in {"hf_lambda_gelu", *sys.stdlib_module_names}}
    assert others == {"transformers.initialization"}


def test_dir(imported: dict[str, Any]) -> None:
    assert set(hlg.__all__) <= set(imported["dir"])
    assert "__version__" in imported["dir"]


def test_registers(imported: dict[str, Any]) -> None:
    name, value = imported["made"]
    assert name == "LambdaGELU"
    assert value == pytest.approx(0.8413447, abs=1e-6)  # Φ(1)


def forked(code: str) -> str:
    """The same where torch and transformers have been imported, and nothing of this package."""
    process = in_fork('import sys\nassert not [n for n in sys.modules if n.startswith("hf_lambda")]\n' + code)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_star() -> None:
    code = "from hf_lambda_gelu import *\nimport hf_lambda_gelu\nprint(*(set(hf_lambda_gelu.__all__) - set(globals())))"
    assert forked(code) == ""


def test_wrong_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'hf_lambda_gelu' has no attribute 'relu_ise'"):
        _ = hlg.relu_ise  # type: ignore[attr-defined]
    assert not hasattr(hlg, "__path_of_nothing__")
    with pytest.raises(ImportError, match="cannot import name 'relu_ise'"):
        from hf_lambda_gelu import relu_ise  # type: ignore[attr-defined]  # noqa: F401


def test_pickle() -> None:
    """A pickle names the class as it did before the rooms, and nothing but the pickle has been imported."""
    code = (
        "import io, pickle, sys, torch\n"
        "class Old(pickle.Unpickler):\n    pass\n"
        "data = b'chf_lambda_gelu.activation\\nLambdaGELU\\n.'\n"
        "cls = Old(io.BytesIO(data)).load()\n"
        "import hf_lambda_gelu as hlg\nassert cls is hlg.LambdaGELU\n"
        "again = pickle.loads(pickle.dumps(hlg.LambdaGELU(3.0)))\nprint(round(again.hardness.item(), 4))"
    )
    assert forked(code) == "3.0"


def test_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hlg, "convert", len)
    assert hlg.convert is len
    monkeypatch.undo()
    from hf_lambda_gelu.surgery.conversion import convert

    assert hlg.convert is convert
    monkeypatch.setattr("hf_lambda_gelu.fold", len)
    assert hlg.fold is len


def test_every_name_from_eight_threads() -> None:
    """In an interpreter that has used none: each thread asks for every name, in another order, and gets the same objects."""
    code = """
import sys, threading, hf_lambda_gelu as hlg
sys.setswitchinterval(1e-5)
barrier, found, failures = threading.Barrier(8), [], []
def ask(number):
    names = hlg.__all__[number * 5:] + hlg.__all__[:number * 5]
    barrier.wait()
    try:
        found.append({name: getattr(hlg, name) for name in names})
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
assert len(found) == 8 and all(one[name] is found[0][name] for one in found for name in hlg.__all__)
for name in hlg.__all__:
    assert found[0][name].__name__ == name, name
    assert vars(hlg)[name] is found[0][name], name  # kept: the second time it is found at once
"""
    forked(code)


def test_three_lists_agree() -> None:
    """What Python loads, what a type checker reads and what `*` gives: the same names, from the same modules."""
    tree = ast.parse(Path(hlg.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    read = {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}
    eager = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.level for alias in node.names}
    assert eager == {"register"}
    assert {name: module for name, module in read.items() if name not in eager} == hlg._MODULES
    assert set(hlg.__all__) == set(read)
    assert len(hlg.__all__) == len(set(hlg.__all__))


def test_no_name_is_a_room() -> None:
    """An imported room becomes an attribute of the package, and would hide a function of its name."""
    root = Path(hlg.__file__).parent
    rooms = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms & {"activation", "training"}
    assert not rooms & set(hlg.__all__)
