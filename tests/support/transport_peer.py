"""A process that serves a region over tcp, to be killed or stopped.

usage: python -m tests.support.transport_peer serve SIZE          a real transport, which serves key "k"
       python -m tests.support.transport_peer die STAGE SIZE      kills itself at a stage of the first fetch:
                                                                  hello, head, first, middle or last
"""

import os
import signal
import socket
import sys
import time
from typing import NoReturn

from loraserve.transport.address import Address
from loraserve.transport.registry import open_transports
from loraserve.transport.wire import (
    HEADER_BYTES,
    HELLO_BYTES,
    MAX_REQUEST_PAYLOAD_BYTES,
    TOKEN_BYTES,
    WELCOME,
    Frame,
    Op,
    decode_header,
    range_frame,
)
from tests.support.transport_kit import file_region, pattern

TOKEN = bytes(TOKEN_BYTES)


def serve(size_bytes: int) -> NoReturn:
    """Serve until somebody ends this process."""
    transport = open_transports(["tcp"], host="127.0.0.1").transports[0]
    transport.publish("k", file_region(pattern(size_bytes)))
    print(transport.address.decode(), flush=True)
    while True:
        time.sleep(60)


def die(stage: str, size_bytes: int) -> None:
    """Answer as a server does, up to the stage."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = Address(host="127.0.0.1", port=listening.getsockname()[1], token=TOKEN)
        print(address.encode().decode(), flush=True)
        while True:
            _answer(listening.accept()[0], stage, size_bytes)


def _answer(sock: socket.socket, stage: str, size_bytes: int) -> None:
    sock.recv(HELLO_BYTES, socket.MSG_WAITALL)
    if stage == "hello":
        _end(sock, WELCOME[:3])
    sock.sendall(WELCOME)
    header = decode_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL), MAX_REQUEST_PAYLOAD_BYTES)
    request = header.frame(sock.recv(header.rest_bytes, socket.MSG_WAITALL))
    if request.op == Op.HEAD:
        answer = Frame(op=Op.HEAD_IS, request_id=request.request_id, end=size_bytes, payload=b"head").encode()
        if stage == "head":
            _end(sock, answer[:-1])
        sock.sendall(answer)
        return
    answer = range_frame(Op.DATA, request.request_id, 0, size_bytes, of_bytes=size_bytes).encode()
    sent = {"first": 0, "middle": size_bytes // 2, "last": size_bytes - 1}[stage]
    _end(sock, answer + pattern(size_bytes)[:sent])


def _end(sock: socket.socket, last_words: bytes) -> NoReturn:
    sock.sendall(last_words)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives that")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    die(sys.argv[2], int(sys.argv[3]))
