"""Threads for work that must not be in the way of serving."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

_NICENESS = 10
_MAX_HASHERS = 16


def background_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """So many threads that the system lets run after the others of this process."""
    return ThreadPoolExecutor(num_threads, name, initializer=_go_last)


def num_hashers() -> int:
    """How many threads verify what comes, for all fetches together: as many as this process may use cores."""
    return min(len(os.sched_getaffinity(0)), _MAX_HASHERS)


def _go_last() -> None:
    with suppress(OSError):  # a sandbox may forbid it: then they compete
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
