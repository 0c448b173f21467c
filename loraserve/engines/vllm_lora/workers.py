"""The threads of a vLLM worker that prepare adapters beside its loop. Engine processes only."""

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from loraserve.pace import Pace

_MAX_THREADS = 4

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """Does the pieces of a work in several threads, or in one and at a pace while requests run."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._num_helpers = min(len(os.sched_getaffinity(0)), _MAX_THREADS) - 1
        self._helpers = ThreadPoolExecutor(max(1, self._num_helpers), "loraserve-help", take_one_thread)

    def each(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """What the function gives for each item, in their order; what it raises is raised, and ends the
        work. This thread does its part."""
        waiting = deque(enumerate(items))
        results: dict[int, _Result] = {}

        def work() -> None:
            while (piece := _next(waiting)) is not None:
                number, item = piece
                try:
                    results[number] = function(item)
                except BaseException:
                    waiting.clear()
                    raise
                self._pace.rest()

        num_helpers = 0 if self._pace.is_busy() else self._num_helpers
        helping = [self._helpers.submit(work) for _ in range(num_helpers)]
        try:
            work()
        finally:
            wait(helping)
        for one in helping:
            one.result()
        return [results[number] for number in range(len(results))]


def _next(waiting: "deque[tuple[int, _Item]]") -> tuple[int, _Item] | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def take_one_thread() -> None:
    """The thread that prepares gets no OpenMP threads of its own.

    With more threads than processors, OpenMP's threads sleep at every barrier instead of spinning, and each
    decode step takes half as long again, for ever.
    """
    import torch

    # Torch sets a thread's number at its first use there: this is it, or it would undo the next line.
    torch.get_num_threads()
    with contextlib.suppress(OSError, AttributeError):
        # The one that torch has loaded: libraries are known by this name.
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)
