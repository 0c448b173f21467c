"""A process at the other end of scheme `ucx`, and what a test asks it.

usage: python -m tests.support.ucx_peer TLS SIZE...
           publishes "k0", "k1"... of these sizes; TLS "" leaves the choice to UCX. Reads one command per
           line: state, withdraw KEY, close
       python -m tests.support.ucx_peer TLS fetch ADDRESS SIZE
           fetches "k0" and is killed at the first bytes
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from loraserve.transport.listener import Listener
from loraserve.transport.ucx import UcxTransport, open_ucx
from tests.support.transport_kit import ROOT, Fetched, fetch, file_region, pattern


def large_pattern(size_bytes: int, seed: int = 0) -> bytes:
    """So many bytes, quickly: a prime number of random ones again and again, so that no two chunks agree."""
    return (pattern(65_537, seed) * (size_bytes // 65_537 + 1))[:size_bytes]


class UcxPeer:
    """The process, as its parent sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self.address = self._stdout.readline().strip().encode()

    def ask(self, command: str) -> dict[str, Any]:
        """Its answer to a command."""
        self._stdin.write(command + "\n")
        self._stdin.flush()
        answer: dict[str, Any] = json.loads(self._stdout.readline())
        return answer

    def signal(self, number: int) -> None:
        """Stop it, let it go on, or kill it, and wait until that is done."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        while number == signal.SIGSTOP and _state_of(self.process.pid) != "T":
            time.sleep(0.001)


def _state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@contextmanager
def ucx_peer(*sizes_bytes: int, tls: str = "") -> Iterator[UcxPeer]:
    """A process that serves bodies of these sizes."""
    command = [sys.executable, "-m", "tests.support.ucx_peer", tls, *map(str, sizes_bytes)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield UcxPeer(process)
        finally:
            process.kill()


@contextmanager
def peers_by_way(*sizes_bytes: int) -> Iterator[Callable[[str], UcxPeer]]:
    """Processes that serve bodies of these sizes, one for each UCX_TLS, started when first asked for."""
    with ExitStack() as stack:
        yield cache(lambda tls: stack.enter_context(ucx_peer(*sizes_bytes, tls=tls)))


def die_while_fetching(address: bytes, size_bytes: int, tls: str = "") -> int:
    """Let a process fetch and be killed in the middle of it; its exit status."""
    command = [
        sys.executable,
        "-m",
        "tests.support.ucx_peer",
        tls,
        "fetch",
        address.decode(),
        str(size_bytes),
    ]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode


def _state(transport: UcxTransport) -> dict[str, Any]:
    begun_s = time.process_time()
    time.sleep(0.2)  # what a process that has nothing to do uses in this time
    return {
        "active_bytes": transport.active_bytes(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "used_s": time.process_time() - begun_s,
    }


def _serve(transport: UcxTransport, sizes_bytes: list[int]) -> None:
    for index, size_bytes in enumerate(sizes_bytes):
        transport.publish(f"k{index}", file_region(large_pattern(size_bytes, index), f"head{index}".encode()))
    print(transport.address.decode(), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["withdraw", key]:
                transport.withdraw(key)
            case ["close"]:
                transport.close()
        print(json.dumps(_state(transport)), flush=True)


def _fetch_and_die(transport: UcxTransport, address: str, size_bytes: int) -> None:
    into = Fetched(size_bytes)
    into.at_first = lambda: os.kill(os.getpid(), signal.SIGKILL)
    fetch(transport, address.encode(), "k0", into)


if __name__ == "__main__":
    ends = open_ucx(Listener("127.0.0.1"), tls=sys.argv[1] or None, chunk_bytes=1024**2)
    if sys.argv[2] == "fetch":
        _fetch_and_die(ends, sys.argv[3], int(sys.argv[4]))
    _serve(ends, [int(each) for each in sys.argv[2:]])
