"""Ends a vLLM process whose replica is gone.

vLLM loads `watch_parent` as a plugin in each of its processes, long before the model is loaded there.
Imports nothing heavy: it runs in processes that have only just begun.
"""

import os
import select
import signal
import threading
import time
from pathlib import Path

PARENT_PID = "LORASERVE_PARENT_PID"
PARENT_START = "LORASERVE_PARENT_START"
_THREAD_NAME = "loraserve-parent-watch"
_POLL_S = 0.5


def watch_parent() -> None:
    """Kill this process as soon as the one named by LORASERVE_PARENT_PID is gone.

    Does nothing without the variable, in that process itself, and when the watch already runs. With
    LORASERVE_PARENT_START (clock ticks, as `process_start` gives them) a process that has merely
    inherited the number counts as gone.
    """
    named = os.environ.get(PARENT_PID, "")
    if not named.isdigit() or int(named) == os.getpid():
        return
    if any(thread.name == _THREAD_NAME for thread in threading.enumerate()):
        return
    _keep_progress_bars_out_of_shared_memory()
    started = os.environ.get(PARENT_START, "")
    threading.Thread(
        target=_kill_self_after, args=(int(named), started), name=_THREAD_NAME, daemon=True
    ).start()


def _keep_progress_bars_out_of_shared_memory() -> None:
    """Give tqdm a lock for threads alone: its own one for processes is a named semaphore, which stays in
    shared memory when this process is killed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return
    tqdm.set_lock(threading.RLock())


def process_start(pid: int) -> str:
    """When the process started, in clock ticks since boot; '' if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The command name before the last parenthesis may hold spaces: count the fields after it.
    return stat.rpartition(")")[2].split()[19]


def _kill_self_after(pid: int, started: str) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        _kill_self()
        return
    except OSError:  # no pidfd in this kernel or sandbox
        handle = -1
    if started and process_start(pid) != started:
        _kill_self()
    if handle < 0:
        _wait_by_polling(pid)
    else:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.poll()
    _kill_self()


def _wait_by_polling(pid: int) -> None:
    started = process_start(pid)
    while started and process_start(pid) == started:
        time.sleep(_POLL_S)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
