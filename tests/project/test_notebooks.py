"""The notebooks of examples/ run on real models, unedited, and their networks are what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel

ROOT = Path(__file__).resolve().parents[2]
Ran = tuple[str, Path, dict[str, torch.Tensor]]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# runs the cells one after another in one namespace, as a kernel does; keeps the tensors that are named
RUN = """
import json, sys
import matplotlib, torch
from safetensors.torch import save_file
matplotlib.use("Agg")
torch.set_num_threads(1)
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
save_file({name: names[name].contiguous() for name in sys.argv[3:]}, sys.argv[2])
"""


@pytest.fixture(params=[("text", "minilm", "movie_reviews"), ("vision", "dinov2_small", "fashion_mnist")], scope="module")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """(notebook, folder it ran in, its tensors); Hub names are replaced by what the notebook reads from the environment."""
    name, model, data = request.param
    asset: Callable[[str], Path] = request.getfixturevalue("asset")
    folder = tmp_path_factory.mktemp(name)
    environment = {
        **os.environ,
        "HLG_EXAMPLE_MODEL": str(asset(model)),
        "HLG_EXAMPLE_DATA": str(asset(data)),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    wanted = ["smooth", "swapped", "refit", "train_vectors" if name == "text" else "train_features"]
    command = [sys.executable, "-c", RUN, str(ROOT / "examples" / f"{name}.ipynb"), "variables.safetensors", *wanted]
    labels = ["train_labels", "test_labels"]
    done = subprocess.run([*command, *labels], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return name, folder, load_file(folder / "variables.safetensors")


def judged(tensors: dict[str, torch.Tensor], vectors: str) -> float:
    """The share of test examples that a logistic regression on the GELU network's vectors names rightly."""
    train = tensors["train_vectors"] if "train_vectors" in tensors else tensors["train_features"]
    classifier = LogisticRegression(C=10.0, max_iter=1000).fit(train.numpy(), tensors["train_labels"].numpy())
    return float(classifier.score(tensors[vectors].numpy(), tensors["test_labels"].numpy()))


def test_the_refit_network_takes_the_smooth_ones_place(ran: Ran) -> None:
    """Judged by the vectors alone and by a classifier that the notebook does not have; ReLU swapped in is far off."""
    _, _, tensors = ran
    similarity = {name: float((tensors[name] * tensors["smooth"]).sum(-1).mean()) for name in ("swapped", "refit")}
    assert similarity["swapped"] < 0.7
    assert similarity["refit"] > 0.9
    right = {name: judged(tensors, name) for name in ("smooth", "swapped", "refit")}
    assert right["refit"] > right["smooth"] - 0.05, right
    assert right["swapped"] < right["smooth"] - 0.08, right


def test_the_folder_is_the_relu_network(ran: Ran) -> None:
    name, folder, _ = ran
    saved = folder / ("minilm-relu" if name == "text" else "dinov2-relu")
    model = AutoModel.from_pretrained(saved)
    assert model.config.hidden_act == "relu"
    acts = [type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__ or "ReLU" in type(m).__name__]
    assert acts == ["ReLU"] * model.config.num_hidden_layers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_as_written(path: Path) -> None:
    """Notebook format 4.5 without outputs, cells told apart by their ids, every import one that an extra brings."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert max(len(line) for cell in cells for line in "".join(cell["source"]).splitlines()) <= 140
    links = [target for cell in cells for target in "".join(cell["source"]).split("](")[1:]]
    for target in (link.partition(")")[0] for link in links):
        assert (path.parent / target).exists(), target
