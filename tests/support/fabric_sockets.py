"""A process's fabric as the kernel sees it: the port that it listens on, and what is not read there yet."""

import contextlib
import os
import select
import socket
import sys
from pathlib import Path

from loraserve.transport.wire import TOKEN_BYTES, WELCOME, WELCOME_BYTES, encode_hello

ESTABLISHED, LISTEN = 0x01, 0x0A
HOST = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}"
PATIENT_S = 5.0


def fabric_port(pid: int) -> int:
    """The port of 127.0.0.1 where the process answers the fabric's hello; AssertionError if there is none."""
    own = _inodes(pid)
    listening = {port for port, state, _, inode in _sockets() if state == LISTEN and inode in own}
    with contextlib.ExitStack() as stack:
        asked = {stack.enter_context(_greeted(port)): port for port in listening}
        while asked:
            # Other servers of the process say nothing, or something else.
            answered, _, _ = select.select(list(asked), [], [], PATIENT_S)
            assert answered, f"none of the ports {sorted(listening)} of process {pid} is its fabric's"
            for sock in answered:
                port = asked.pop(sock)
                with contextlib.suppress(OSError):
                    if sock.recv(WELCOME_BYTES) == WELCOME:
                        return port
    raise AssertionError(f"process {pid} has no fabric")


def unread_bytes(port: int) -> int:
    """What clients of the port have sent and its process has not read."""
    return sum(unread for here, state, unread, _ in _sockets() if here == port and state == ESTABLISHED)


def is_listened_on(port: int) -> bool:
    """Whether any process listens there."""
    return any(here == port and state == LISTEN for here, state, _, _ in _sockets())


def _sockets() -> list[tuple[int, int, int, int]]:
    """Port, state, unread bytes and inode of each TCP socket at 127.0.0.1."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    found = []
    for line in lines:
        _, local, _, state, queues, *rest = line.split()
        (host, port), unread, inode = local.split(":"), queues.partition(":")[2], rest[4]
        if host == HOST:
            found.append((int(port, 16), int(state, 16), int(unread, 16), int(inode)))
    return found


def _inodes(pid: int) -> set[int]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            kind, _, rest = os.readlink(entry).partition(":[")
            if kind == "socket":
                found.add(int(rest[:-1]))
    return found


def _greeted(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), PATIENT_S)
    sock.sendall(encode_hello(bytes(TOKEN_BYTES)))
    return sock
