"""A peer that says a little all the time holds nobody for ever."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from loraserve.transport.address import Address
from loraserve.transport.base import FetchStoppedError, PeerSlowError
from loraserve.transport.listener import Listener
from loraserve.transport.tcp import PIECE_BYTES, TcpTransport
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
from tests.support.transport_kit import PATIENT_S, Fetched, fetch, nothing_leaks

DRIP_S = 0.002
IDLE_S = 0.5


@pytest.fixture
def here() -> Iterator[TcpTransport]:
    """This process's end, of which nothing is left."""
    with nothing_leaks():
        transport = TcpTransport(Listener("127.0.0.1"))
        yield transport
        assert transport.active_bytes() == 0
        transport.close()


@contextmanager
def dripping(first: Callable[[Frame], bytes], drop: Callable[[Frame], bytes]) -> Iterator[bytes]:
    """The address of a peer that answers with `first`, and then says `drop` again and again."""
    ended = threading.Event()

    def serve() -> None:
        sock, _ = listening.accept()
        with sock:
            sock.recv(HELLO_BYTES, socket.MSG_WAITALL)
            sock.sendall(WELCOME)
            header = decode_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL), MAX_REQUEST_PAYLOAD_BYTES)
            request = header.frame(sock.recv(header.rest_bytes, socket.MSG_WAITALL))
            try:
                sock.sendall(first(request))
                while not ended.wait(DRIP_S):
                    sock.sendall(drop(request))
            except OSError:
                return  # the reader has gone

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            port = listening.getsockname()[1]
            yield Address(host="127.0.0.1", port=port, token=bytes(TOKEN_BYTES)).encode()
        finally:
            ended.set()
            serving.join(PATIENT_S)


def test_a_stop_is_heard_while_a_body_drips(here: TcpTransport) -> None:
    size_bytes = 4 * PIECE_BYTES
    got = Fetched(size_bytes)
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 5

    def data(request: Frame) -> bytes:
        return range_frame(Op.DATA, request.request_id, 0, size_bytes, of_bytes=size_bytes).encode()

    with dripping(data, lambda request: b"x") as address, pytest.raises(FetchStoppedError):
        fetch(here, address, "k", got, stop=stop)
    assert got.ranges == []


def test_a_head_that_drips_is_given_up(here: TcpTransport) -> None:
    def begun(request: Frame) -> bytes:
        return Frame(op=Op.HEAD_IS, request_id=request.request_id, payload=bytes(100_000)).encode()[:100]

    with dripping(begun, lambda request: b"x") as address, pytest.raises(PeerSlowError, match="not finished"):
        here.read_head(address, "k", idle_timeout_s=IDLE_S)


def test_a_peer_that_asks_for_patience_for_ever_is_given_up(
    here: TcpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraserve.transport.link.MAX_WAIT_S", IDLE_S)

    def wait(request: Frame) -> bytes:
        return Frame(op=Op.WAIT, request_id=request.request_id).encode()

    with dripping(wait, wait) as address, pytest.raises(PeerSlowError, match="still being made"):
        here.read_head(address, "k", idle_timeout_s=PATIENT_S)
