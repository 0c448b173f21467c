"""The plainest transfer over a TCP connection between two processes: sendfile into recv_into.

No protocol, no checks. The parent receives into memory that it has touched, and prints GiB/s per MiB, as
`fetch_bare.py --json` does, whose arguments it takes. Both ends use reno where the kernel has it, as the
fabric does within one host; with the setting USUAL=1 they use sendall and the system's congestion control.
"""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import socket
import sys
import time

from fetch_bare import MIB, WARM_UPS, parse

_PLAIN = b"reno"


def _body(size_bytes: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("body", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    memory = mmap.mmap(fd, size_bytes)
    for begin in range(0, size_bytes, mmap.PAGESIZE):
        memory[begin] = 1
    return fd, memory


def _plain(end: socket.socket) -> socket.socket:
    with contextlib.suppress(OSError):  # this kernel has no other
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _PLAIN)
    return end


def _send(port: int, sizes_mib: list[int], repeats: int, is_usual: bool) -> None:
    with socket.socket() if is_usual else _plain(socket.socket()) as end:
        end.connect(("127.0.0.1", port))
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size_mib in sizes_mib:
            fd, memory = _body(size_mib * MIB)
            for _ in range(WARM_UPS + repeats):
                end.recv(1, socket.MSG_WAITALL)
                if is_usual:
                    end.sendall(memory)
                    continue
                sent = 0
                while sent < size_mib * MIB:
                    sent += os.sendfile(end.fileno(), fd, sent, size_mib * MIB - sent)
            os.close(fd)


def _receive(end: socket.socket, sizes_mib: list[int], repeats: int) -> dict[int, list[float]]:
    seconds: dict[int, list[float]] = {}
    for size_mib in sizes_mib:
        fd, memory = _body(size_mib * MIB)
        os.close(fd)
        body = memoryview(memory)
        seconds[size_mib] = []
        for _ in range(WARM_UPS + repeats):
            begun_s = time.perf_counter()
            end.send(b"1")
            there = 0
            while there < len(body):
                there += end.recv_into(body[there:], 0, socket.MSG_WAITALL)
            seconds[size_mib].append(time.perf_counter() - begun_s)
    return {size_mib: each[WARM_UPS:] for size_mib, each in seconds.items()}


def main(arguments: argparse.Namespace) -> None:
    """Run both processes and print what the receiver measured."""
    is_usual = "USUAL=1" in arguments.settings
    made = socket.create_server(("127.0.0.1", 0))
    with made if is_usual else _plain(made) as listening:
        sender = multiprocessing.get_context("spawn").Process(
            target=_send,
            args=(listening.getsockname()[1], arguments.sizes_mib, arguments.repeats, is_usual),
            daemon=True,
        )
        sender.start()
        end, _ = listening.accept()
        with end:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            seconds = _receive(end, arguments.sizes_mib, arguments.repeats)
        sender.join(10)
    rates = {
        size_mib: [size_mib / 1024 / each for each in sorted(times)] for size_mib, times in seconds.items()
    }
    print(json.dumps({size: {"gib_per_s": each} for size, each in rates.items()}))


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
