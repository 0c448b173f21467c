"""The plainest loops over ucxx between two processes, which LoRAServe's transport is measured against.

No protocol, no checks, nobody who could die: two workers that know each other, chunks sent in order with a
window. The parent receives into memory that it has touched, and prints GiB/s per size: median, best, worst.

usage: fetch_bare.py [--tls TLS] [--way event|poll|spin|block] [--chunk-mib N] [--window N] [--sizes-mib N,N]
                     [--repeats N] [--json] [KEY=VALUE...]

--way: who makes UCX progress. event: the thread that transfers, which waits in epoll when there is nothing
to do (the fastest here); spin: the same thread, without waiting; poll and block: ucxx's own thread, spinning
or waiting. KEY=VALUE are UCX's settings without their UCX_.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from loraserve.transport.ucx_library import UcxLibrary, may_share_memory

MIB = 1024**2
WARM_UPS = 2
WAIT_MS = 10


class BareEnd:
    """One process's worker, and its endpoint at the other one."""

    def __init__(self, arguments: argparse.Namespace, pipe: Connection) -> None:
        options = dict(each.split("=", 1) for each in arguments.settings)
        self.way, self.window = arguments.way, arguments.window
        self.library = UcxLibrary(arguments.tls or None, options)
        core = self.library.core
        self.context = self.library.context()
        self.worker = core.UCXWorker(self.context)
        if self.way in ("event", "block"):
            self.worker.init_blocking_progress_mode()
        pipe.send_bytes(bytes(self.worker.address))
        address = core.UCXAddress.create_from_buffer(pipe.recv_bytes())
        self.endpoint = self.worker.create_endpoint_from_worker_address(
            address, endpoint_error_handling=not may_share_memory(self.library.tls)
        )
        if self.way in ("poll", "block"):
            self.worker.start_progress_thread(polling_mode=self.way == "poll", epoll_timeout=WAIT_MS)

    def transfer(self, post: Callable[[int], Any], count: int) -> None:
        """Have so many chunks on their way, a window of them at a time, until all are there."""
        pending: list[Any] = []
        posted = 0
        while posted < count or pending:
            while posted < count and len(pending) < self.window:
                pending.append(post(posted))
                posted += 1
            self._wait()
            pending = [request for request in pending if not request.completed]

    def _wait(self) -> None:
        if self.way == "event":
            self.worker.progress_worker_event(WAIT_MS)
        elif self.way == "spin":
            self.worker.progress()
        else:
            time.sleep(0.00005)


def run(arguments: argparse.Namespace, pipe: Connection, *, receives: bool) -> dict[int, list[float]]:
    """Seconds of each transfer by MiB, as the receiver sees them: from asking to the last byte."""
    end = BareEnd(arguments, pipe)
    tag = end.library.core.UCXXTag
    seconds: dict[int, list[float]] = {}
    for size_mib in arguments.sizes_mib:
        body = memoryview(_memory(size_mib * MIB))
        chunk = arguments.chunk_mib * MIB or len(body)
        chunks = [end.library.array(body[begin : begin + chunk]) for begin in range(0, len(body), chunk)]
        seconds[size_mib] = []
        for _ in range(WARM_UPS + arguments.repeats):
            if receives:
                begun_s = time.perf_counter()
                pipe.send_bytes(b"send")
                end.transfer(lambda i, chunks=chunks: end.worker.tag_recv(chunks[i], tag(i)), len(chunks))  # type: ignore[misc]
                seconds[size_mib].append(time.perf_counter() - begun_s)
                pipe.send_bytes(b"there")
            else:
                pipe.recv_bytes()
                end.transfer(lambda i, chunks=chunks: end.endpoint.tag_send(chunks[i], tag(i)), len(chunks))  # type: ignore[misc]
                pipe.recv_bytes()
    return {size_mib: each[WARM_UPS:] for size_mib, each in seconds.items()}


def _memory(size_bytes: int) -> mmap.mmap:
    """So many bytes of a memfd, as a segment has them, touched."""
    descriptor = os.memfd_create("body", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size_bytes)
    memory = mmap.mmap(descriptor, size_bytes)
    os.close(descriptor)
    for begin in range(0, size_bytes, mmap.PAGESIZE):
        memory[begin] = 1
    return memory


def _serve(arguments: argparse.Namespace, pipe: Connection) -> None:
    run(arguments, pipe, receives=False)
    pipe.recv_bytes()  # the receiver may still want to hear of the last chunk
    os._exit(0)


def _sizes(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tls", default="posix,cma,self", help="UCX_TLS; '' leaves the choice to UCX")
    parser.add_argument("--way", choices=("event", "poll", "spin", "block"), default="event")
    parser.add_argument("--chunk-mib", type=int, default=8, help="0: the whole body at once")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--sizes-mib", type=_sizes, default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run both processes and print what the receiver measured."""
    arguments = parse(argv)
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    sender = processes.Process(target=_serve, args=(arguments, there), daemon=True)
    sender.start()
    seconds = run(arguments, here, receives=True)
    here.send_bytes(b"end")
    sender.join(10)
    rates = {
        size_mib: [size_mib / 1024 / each for each in sorted(times)] for size_mib, times in seconds.items()
    }
    if arguments.json:
        print(json.dumps({size: {"gib_per_s": each} for size, each in rates.items()}))
    else:
        for size_mib, each in rates.items():
            print(
                f"{size_mib:5d} MiB  {statistics.median(each):6.2f} ({each[0]:.2f} to {each[-1]:.2f}) GiB/s"
            )
    sys.stdout.flush()
    # Without error handling the endpoint's destructor would wait for a peer that has left.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
