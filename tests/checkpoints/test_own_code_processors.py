"""Processors of code of their own: carried along with a model of transformers' own, by the command and by the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import answer, invoke, pictures, vit
from support.own_code import rewrite
from transformers import AutoImageProcessor, AutoProcessor

import hf_lambda_gelu as hlg

IMAGES = """
from transformers import ViTImageProcessorPil


class OwnImageProcessor(ViTImageProcessorPil):
    def __call__(self, images, **kwargs):
        return super().__call__([image.rotate(90) for image in images], **kwargs)
"""
PROCESSOR = """
from transformers import ProcessorMixin


class OwnProcessor(ProcessorMixin):
    attributes = ["image_processor"]
    image_processor_class = "AutoImageProcessor"

    def __init__(self, image_processor=None, **kwargs):
        super().__init__(image_processor, **kwargs)

    def __call__(self, images, **kwargs):
        return self.image_processor(images=images, **kwargs)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vit(tmp_path / "src")
    (tmp_path / "src" / "image_processing_own.py").write_text(IMAGES)
    auto = {"AutoImageProcessor": "image_processing_own.OwnImageProcessor"}
    rewrite(tmp_path / "src" / "preprocessor_config.json", image_processor_type="OwnImageProcessor", auto_map=auto)
    return tmp_path / "src"


def test_an_image_processor(folder: Path, tmp_path: Path) -> None:
    """Used for the calibration, saved with its code; the card says so; without trust nothing is made."""
    data = ("--calibration", pictures(tmp_path / "pictures"))
    error = invoke("relu-ize", folder, tmp_path / "relu", *data, "--force", code=1).stderr
    assert "preprocessor_config.json names 'image_processing_own.OwnImageProcessor' as its AutoImageProcessor" in error
    answer("relu-ize", folder, tmp_path / "relu", *data, "--force", "--trust-remote-code")
    assert (tmp_path / "relu" / "image_processing_own.py").read_text() == IMAGES
    card = (tmp_path / "relu" / "README.md").read_text()
    assert "from transformers import AutoImageProcessor, ViTForImageClassification\n" in card
    assert 'model = ViTForImageClassification.from_pretrained("relu")\n' in card
    assert 'image_processor = AutoImageProcessor.from_pretrained("relu", trust_remote_code=True)\n' in card
    assert answer("verify", tmp_path / "relu", "--trust-remote-code")["largest_difference"] == 0.0
    record = json.loads((tmp_path / "relu" / "lambda_gelu.json").read_text())
    assert record["checks"]["code_that_was_trusted"] == ["image_processing_own.py"]
    loaded: Any = AutoImageProcessor.from_pretrained(tmp_path / "relu", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnImageProcessor"


def test_a_processor_that_holds_it(folder: Path, tmp_path: Path) -> None:
    """One file of each comes along."""
    (folder / "processing_own.py").write_text(PROCESSOR)
    auto = {"AutoProcessor": "processing_own.OwnProcessor"}
    rewrite(folder / "processor_config.json", processor_class="OwnProcessor", auto_map=auto)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "OwnProcessor"
    answer(
        "relu-ize", folder, tmp_path / "relu", "--calibration", pictures(tmp_path / "p"), "--force", "--trust-remote-code"
    )
    assert {path.name for path in (tmp_path / "relu").glob("*.py")} == {"image_processing_own.py", "processing_own.py"}
    again: Any = AutoProcessor.from_pretrained(tmp_path / "relu", trust_remote_code=True)
    assert (type(again).__name__, type(again.image_processor).__name__) == ("OwnProcessor", "OwnImageProcessor")
    hlg.audit(tmp_path / "relu", trust_remote_code=True)
