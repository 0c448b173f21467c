"""Threads for work that must not be in the way of serving."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

_NICENESS = 10


def background_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """So many threads that the system lets run after the others of this process."""
    return ThreadPoolExecutor(num_threads, name, initializer=_go_last)


def _go_last() -> None:
    with suppress(OSError):  # a sandbox may forbid it: then they compete
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
