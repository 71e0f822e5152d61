"""The weights of the block that is wanted next, read by a thread while another block is worked on. [derived]"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

P = TypeVar("P")

NAME = "hf_lambda_gelu-read-ahead"


class ReadAhead(Generic[P]):
    """Reads one block ahead, never more: the next one begins when what there is was taken, or dropped.

    Args:
        read: fills a buffer with what is at a place. It runs in the thread, one place after the other.
    """

    def __init__(self, read: Callable[[P, memoryview], None]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[tuple[list[int], tuple[int, Exception] | None]] | None = None
        self._enough = threading.Event()

    def start(self, wanted: Sequence[tuple[int, P, memoryview]]) -> None:
        """Begin to fill these buffers, each known by a number; what was read before and not taken is dropped."""
        self.take(())
        self._enough.clear()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, NAME)
        self._running = self._pool.submit(self._fill, list(wanted))

    def take(self, numbers: Collection[int]) -> list[int]:
        """Which of these are there by now. Reading ends: the rest is for the caller to read.

        Raises:
            What reading one of them has raised in the thread.
        """
        if self._running is None:
            return []
        self._enough.set()
        done, failed = self._running.result()
        self._running = None
        if failed is not None and failed[0] in numbers:
            raise failed[1]
        return [number for number in done if number in numbers]

    def close(self) -> None:
        """End the thread."""
        self._enough.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._running = None

    def _fill(self, wanted: Sequence[tuple[int, P, memoryview]]) -> tuple[list[int], tuple[int, Exception] | None]:
        done: list[int] = []
        for number, place, buffer in wanted:
            if self._enough.is_set():
                break
            try:
                self._read(place, buffer)
            except Exception as error:
                return done, (number, error)
            done.append(number)
        return done, None
