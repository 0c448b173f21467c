"""The adapters that a vLLM worker can reach: mapped segments, prepared off its loop.

Engine processes only. The pool never lets go of an adapter by itself: the replica opens and closes.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from loraserve.adapters.segment import MappedSegment, SegmentError, SegmentRef, map_segment

_NICENESS = 10

Prepared = Mapping[str, Any]
"""An adapter in the form that fills a slot, by layer."""


class _Entry:
    """One adapter: its mapping and, while it is being filled into a slot or is in one, its prepared form."""

    def __init__(self, segment: MappedSegment, work: "Future[Prepared]") -> None:
        self.segment = segment
        self.work: Future[Prepared] | None = work


class WorkerPool:
    """Adapters by vLLM's integer id. Methods are called on the worker's loop; work is done beside it."""

    def __init__(self, prepare: Callable[[MappedSegment], Prepared]) -> None:
        self._prepare = prepare
        self._entries: dict[int, _Entry] = {}
        self._executor = ThreadPoolExecutor(1, "loraserve-prepare", initializer=_yield_to_the_loop)

    def open(self, lora_id: int, ref: SegmentRef) -> None:
        """Map a segment and begin to prepare it; SegmentError if there is none, or another one.

        Its bytes are not hashed here: `loraserve.adapters.segment` says why they need not be.
        """
        segment = map_segment(ref)
        self._entries[lora_id] = _Entry(segment, self._executor.submit(self._prepare, segment))

    def rank(self, lora_id: int) -> int:
        """The adapter's highest rank."""
        return self._entries[lora_id].segment.rank

    def begin(self, lora_id: int) -> bool:
        """Whether the adapter is prepared; if it is not, it is being prepared from now on.

        What was wrong with it is raised.
        """
        entry = self._entries[lora_id]
        if entry.work is None:
            entry.work = self._executor.submit(self._prepare, entry.segment)
        if not entry.work.done():
            return False
        entry.work.result()
        return True

    def prepared(self, lora_id: int) -> Prepared:
        """The prepared form, waiting for it if need be; SegmentError for an adapter that is not here."""
        entry = self._entries.get(lora_id)
        if entry is None:
            raise SegmentError(f"adapter number {lora_id} is not in the pool")
        if entry.work is None:
            entry.work = self._executor.submit(self._prepare, entry.segment)
        return entry.work.result()

    def forget_prepared(self, lora_id: int) -> None:
        """Free the prepared form of an adapter that has left its slot; unfinished work goes on."""
        entry = self._entries.get(lora_id)
        if entry is not None and entry.work is not None and entry.work.done():
            entry.work = None

    def close(self, lora_id: int) -> None:
        """Let go of the adapter; one that is not here is no error."""
        self._entries.pop(lora_id, None)

    def sizes_bytes(self) -> Mapping[int, int]:
        """The mapped bytes of every adapter."""
        return {lora_id: entry.segment.size_bytes for lora_id, entry in self._entries.items()}


def go_last() -> None:
    """Let this thread's work go after serving, which may share its processors."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _yield_to_the_loop() -> None:
    """The thread that computes tokens goes before the one that prepares.

    This one gets no OpenMP threads of its own: with more threads than processors, OpenMP's threads sleep at
    every barrier instead of spinning, and each decode step takes half as long again, for ever.
    """
    import torch

    go_last()
    # Torch sets a thread's number at its first use there: this is it, or it would undo the next line.
    torch.get_num_threads()
    with contextlib.suppress(OSError, AttributeError):
        # The one that torch has loaded: libraries are known by this name.
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)
