"""Blocks that may draw random numbers: afterwards all three generators go on as if nothing had been."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from hf_lambda_gelu.structure.random_state import random_numbers_from, random_state_kept

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    """One number of each generator, which moves all three."""
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("block", [random_state_kept, lambda: random_state_kept(CPU), lambda: random_numbers_from(7, CPU)])
def test_numbers_go_on(block: Callable[[], AbstractContextManager[None]], raises: bool) -> None:
    seed_all()
    draw()
    expected = [draw(), draw()]
    seed_all()
    draw()
    with contextlib.suppress(KeyError), block():
        draw()
        torch.manual_seed(99)
        if raises:
            raise KeyError
    assert [draw(), draw()] == expected


def test_numbers_start_from_the_seed() -> None:
    """Whatever was drawn before; each generator as its own library seeds it. NumPy takes 32 bits, torch 64."""
    seed = 2**32 + 5
    expected = (
        random.Random(seed).random(),
        np.random.RandomState(5).rand(),
        torch.rand(1, generator=torch.Generator().manual_seed(seed)).item(),
    )
    for _ in range(2):
        draw()
        with random_numbers_from(seed, CPU):
            assert draw() == expected


def test_keeping_does_not_seed() -> None:
    seed_all()
    expected = draw()
    seed_all()
    with random_state_kept():
        assert draw() == expected
