"""A stop at a line of one's choice, as Ctrl-C would be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Stop(BaseException):
    """What no code expects."""


@contextmanager
def stopped_after(owner: Any, name: str, call: int) -> Iterator[None]:
    """What runs within must reach that call of a function, and is stopped right after it."""
    function, calls = getattr(owner, name), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = function(*args, **kwargs)
        calls += 1
        if calls == call:
            raise Stop
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(Stop):
            yield
