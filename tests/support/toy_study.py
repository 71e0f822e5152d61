"""A task for the studies that takes a second: a small MLP on points of a space."""

from __future__ import annotations

import datasets
import numpy as np

from scripts.studies.scratch import MLPConfig, MLPForClassification, ScratchTask

FEATURES = 5


def rows(count: int, seed: int) -> datasets.Dataset:
    """Two classes, on either side of a sphere."""
    features = np.random.default_rng(seed).standard_normal((count, FEATURES)).astype(np.float32)
    labels = (np.square(features).sum(1) > FEATURES - 0.7).astype(np.int64)
    return datasets.Dataset.from_dict({"features": features, "labels": labels}).with_format("torch")


def splits() -> datasets.DatasetDict:
    return datasets.DatasetDict(train=rows(320, 0), validation=rows(50, 1), test=rows(200, 2))


def network() -> MLPForClassification:
    return MLPForClassification(MLPConfig(features=FEATURES, hidden_size=16, num_hidden_layers=3, num_labels=2))


TASK = ScratchTask("toy", "toy", 256, 200, 4, (1e-2, 1e-3), splits, network)
