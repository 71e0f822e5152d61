"""Random numbers for the time of a block; afterwards the generators of Python, NumPy and torch are as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(*devices: torch.device) -> Iterator[None]:
    """Within the block, random numbers may be drawn and seeds be set; afterwards they go on as if nothing had been.

    Args:
        devices: accelerators whose generators are kept as well, all of one type, each with its index. The CPU's always is.
    """
    accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
    kind = next((device.type for device in accelerators), "cuda")  # one that torch knows, if none is meant
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(sorted(device.index for device in accelerators), device_type=kind):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@contextmanager
def random_numbers_from(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, random numbers start from `seed`, on all devices of that type; afterwards they go on."""
    count = 0 if device.type == "cpu" else torch.get_device_module(device).device_count()
    with random_state_kept(*(torch.device(device.type, index) for index in range(count))):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators that nobody keeps
        if count:
            torch.get_device_module(device).manual_seed_all(seed)
        yield
