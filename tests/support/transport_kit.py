"""Regions to publish, two ends to move them between, and processes to lose."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.transport.base import Region, Transport

ROOT = Path(__file__).parents[2]
PATIENT_S = 20.0
"""Longer than anything here takes; a test that needs it has failed."""


class Owned:
    """Closes a descriptor once nobody refers to it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def pattern(size_bytes: int, seed: int = 0) -> bytes:
    """So many bytes, other ones for each seed."""
    return random.Random(seed).randbytes(size_bytes)


def memory_region(body: bytes, head: bytes = b"head") -> Region:
    """A region that is nowhere but in memory."""
    return Region(head=head, body=body, size_bytes=len(body))


def file_region(body: bytes, head: bytes = b"head", offset: int = 4096) -> Region:
    """A region in a memfd, `offset` bytes from its start."""
    fd = os.memfd_create("region", os.MFD_CLOEXEC)
    owner = Owned(fd)
    os.ftruncate(fd, offset)
    os.lseek(fd, 0, os.SEEK_END)
    with memoryview(body) as view:
        written = 0
        while written < len(body):
            with view[written:] as rest:
                written += os.write(fd, rest)
    return Region(head=head, body=body, size_bytes=len(body), fd=fd, fd_offset=offset, owner=owner)


class Fetched:
    """A destination and what was told of it."""

    def __init__(self, size_bytes: int) -> None:
        self.body = bytearray(size_bytes)
        self.ranges: list[tuple[int, int]] = []
        self.at_first: Callable[[], object] | None = None

    def on_bytes(self, begin: int, end: int) -> None:
        """The fetch's progress."""
        self.ranges.append((begin, end))
        if self.at_first is not None and len(self.ranges) == 1:
            self.at_first()

    def covered(self) -> bool:
        """Whether the ranges are the whole body, each byte once."""
        ends = sorted(self.ranges)
        begins = [0, *(end for _, end in ends)]
        return [begin for begin, _ in ends] == begins[:-1] and begins[-1] == len(self.body)


def fetch(
    here: Transport,
    address: bytes,
    key: str,
    into: Fetched,
    *,
    idle_timeout_s: float = PATIENT_S,
    stop: Callable[[], bool] = lambda: False,
) -> Fetched:
    """Fetch with the defaults of a test."""
    here.fetch(address, key, into.body, on_bytes=into.on_bytes, idle_timeout_s=idle_timeout_s, stop=stop)
    return into


def eventually(true: Callable[[], bool], what: str) -> None:
    """Wait for what another thread or process is about to do."""
    give_up_at = time.monotonic() + PATIENT_S
    while not true():
        assert time.monotonic() < give_up_at, f"never came: {what}"
        time.sleep(0.002)


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """As many threads and descriptors after as before."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENT_S)
    left = set(threading.enumerate()) - threads
    assert not left
    eventually(lambda: _descriptors() <= descriptors, "the descriptors of before")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def peer_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A second process that serves, and its address: `tests/support/transport_peer.py`."""
    command = [sys.executable, "-m", "tests.support.transport_peer", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip().encode()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
