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
from loraserve.pace import Pace

_NICENESS = 10

Prepared = Mapping[str, Any]
"""An adapter in the form that fills a slot, by layer."""


Prepare = Callable[[MappedSegment, Callable[[], None]], Prepared]
"""Makes the prepared form, and calls what it is given after each piece of that work."""


class _Entry:
    """One adapter: its mapping and, while it is being filled into a slot or is in one, its prepared form."""

    def __init__(self, ref: SegmentRef) -> None:
        self.ref = ref
        self.segment: MappedSegment | None = None
        self.work: Future[Prepared] | None = None


class WorkerPool:
    """Adapters by vLLM's integer id. Methods are called on the worker's loop; work is done beside it, in
    small pieces while requests run (`is_busy`)."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self.is_busy = False
        self._num_awaited = 0
        self._pace = Pace(is_busy=lambda: self.is_busy and not self._num_awaited)
        self._entries: dict[int, _Entry] = {}
        self._executor = ThreadPoolExecutor(1, "loraserve-prepare", initializer=_take_one_thread)

    def open(self, lora_id: int, ref: SegmentRef) -> None:
        """Begin to map a segment and to prepare it; what is wrong with it is for `begin` to tell.

        Its bytes are not hashed here: `loraserve.adapters.segment` says why they need not be.
        """
        entry = self._entries[lora_id] = _Entry(ref)
        self._work(entry)

    def rank(self, lora_id: int) -> int:
        """The highest rank of an adapter that has been prepared."""
        segment = self._entries[lora_id].segment
        if segment is None:
            raise SegmentError(f"adapter number {lora_id} has not been mapped")
        return segment.rank

    def begin(self, lora_id: int) -> bool:
        """Whether the adapter is prepared; if it is not, it is being prepared from now on.

        What was wrong with it is raised.
        """
        work = self._work(self._entries[lora_id])
        if not work.done():
            return False
        work.result()
        return True

    def prepared(self, lora_id: int) -> Prepared:
        """The prepared form, waiting for it if need be; SegmentError for an adapter that is not here."""
        entry = self._entries.get(lora_id)
        if entry is None:
            raise SegmentError(f"adapter number {lora_id} is not in the pool")
        self._num_awaited += 1
        try:
            return self._work(entry).result()
        finally:
            self._num_awaited -= 1

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
        return {
            lora_id: entry.segment.size_bytes
            for lora_id, entry in self._entries.items()
            if entry.segment is not None
        }

    def _work(self, entry: _Entry) -> "Future[Prepared]":
        """The work on an adapter, which is begun if it has not been."""
        if entry.work is None:
            entry.work = self._executor.submit(self._prepared, entry)
        return entry.work

    def _prepared(self, entry: _Entry) -> Prepared:
        if entry.segment is None:
            entry.segment = map_segment(entry.ref)
        return self._prepare(entry.segment, self._pace.rest)


def go_last() -> None:
    """Let this thread's work go after serving, which may share its processors."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _take_one_thread() -> None:
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
