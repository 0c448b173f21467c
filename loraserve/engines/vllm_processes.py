"""The processes that a vLLM engine runs: found, watched, and ended whatever they do."""

import asyncio
import contextlib
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_ENGINE_NAME = "EngineCore"
_POLL_S = 0.02


class EngineProcesses:
    """Handles to the engine's processes that stay right when the system reuses a number."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._handles: dict[int, int] = {}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._handles[pid] = os.pidfd_open(pid)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids, the engine's own first."""
        return tuple(self._handles)

    def alive(self) -> tuple[int, ...]:
        """Those that have not ended."""
        poller = select.poll()
        for handle in self._handles.values():
            poller.register(handle, select.POLLIN)
        ended = {handle for handle, _ in poller.poll(0)}
        return tuple(pid for pid, handle in self._handles.items() if handle not in ended)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for handle in self._handles.values():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    async def wait(self, timeout_s: float) -> bool:
        """Whether all have ended within the time."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Give the handles back; the object knows no process afterwards."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            os.close(handle)


def engine_children() -> frozenset[int]:
    """The vLLM engine processes that this process has started and that still run."""
    return frozenset(
        child.pid
        for child in multiprocessing.active_children()
        if child.pid is not None and child.name.startswith(_ENGINE_NAME)
    )


def with_descendants(pids: Iterable[int]) -> tuple[int, ...]:
    """The processes and all that descend from them, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = list(pids)
    for pid in found:  # grows while it is walked: breadth first
        found.extend(children.get(pid, ()))
    return tuple(found)


def kill_pids(pids: Iterable[int]) -> None:
    """SIGKILL to children of this process; one that is gone is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
