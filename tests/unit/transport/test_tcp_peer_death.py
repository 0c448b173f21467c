"""A peer that dies or stops, wherever it is, is one clear error in bounded time, and costs nothing else."""

import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from loraserve.transport.address import Address
from loraserve.transport.base import BadPeerError, FetchStoppedError, PeerGoneError, PeerSlowError
from loraserve.transport.listener import Listener
from loraserve.transport.tcp import TcpTransport
from loraserve.transport.wire import (
    HELLO_BYTES,
    MAX_ANSWER_PAYLOAD_BYTES,
    TOKEN_BYTES,
    WELCOME,
    Frame,
    Op,
    range_frame,
)
from tests.support.adapter_maker import one_line
from tests.support.transport_kit import PATIENT_S, Fetched, fetch, nothing_leaks, pattern, peer_process

SIZE_BYTES = 3 * 1024**2 + 7
LARGE_BYTES = 64 * 1024**2


@pytest.fixture
def here() -> Iterator[TcpTransport]:
    """This process's end, of which nothing is left."""
    with nothing_leaks():
        transport = TcpTransport(Listener("127.0.0.1"))
        yield transport
        assert transport.active_bytes() == 0
        transport.close()


@pytest.mark.parametrize("stage", ["hello", "head", "first", "middle", "last"])
def test_a_peer_that_is_killed_ends_the_fetch(here: TcpTransport, stage: str) -> None:
    got = Fetched(SIZE_BYTES)
    with peer_process("die", stage, str(SIZE_BYTES)) as (process, address):

        def take() -> None:
            here.read_head(address, "k", idle_timeout_s=PATIENT_S)
            fetch(here, address, "k", got)

        with pytest.raises(PeerGoneError) as raised:
            take()
        assert process.wait(PATIENT_S) == -signal.SIGKILL
        assert one_line(raised.value)
        assert not got.covered()
        for begin, end in got.ranges:
            assert got.body[begin:end] == pattern(SIZE_BYTES)[begin:end]
        with pytest.raises(PeerGoneError, match="cannot be reached"):
            here.read_head(address, "k", idle_timeout_s=PATIENT_S)


def test_a_real_server_that_is_killed_while_it_sends_ends_the_fetch(here: TcpTransport) -> None:
    got = Fetched(LARGE_BYTES)
    with peer_process("serve", str(LARGE_BYTES)) as (process, address):
        got.at_first = process.kill
        with pytest.raises(PeerGoneError):
            fetch(here, address, "k", got)
    assert not got.covered()


def test_a_peer_that_stops_is_slow_and_may_come_back(here: TcpTransport) -> None:
    got = Fetched(LARGE_BYTES)
    with peer_process("serve", str(LARGE_BYTES)) as (process, address):
        got.at_first = lambda: process.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerSlowError, match=r"did nothing for 0\.2 s"):
            fetch(here, address, "k", got, idle_timeout_s=0.2)
        with pytest.raises(PeerSlowError):  # the kernel takes the connection, and nobody answers
            here.read_head(address, "k", idle_timeout_s=0.2)
        process.send_signal(signal.SIGCONT)
        assert fetch(here, address, "k", Fetched(LARGE_BYTES)).body == pattern(LARGE_BYTES)


def test_a_stop_is_heard_while_a_peer_is_silent(here: TcpTransport) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 5

    with peer_process("serve", "1000") as (process, address):
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(FetchStoppedError):
            fetch(here, address, "k", Fetched(1000), stop=stop)


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100)])
def test_somebody_else_at_the_address_is_found_out(here: TcpTransport, words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        port = listening.getsockname()[1]

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(words)
                sock.recv(4096)

        answering = threads.submit(answer)
        address = Address(host="127.0.0.1", port=port, token=bytes(TOKEN_BYTES)).encode()
        with pytest.raises(BadPeerError, match="does not speak the fabric's protocol"):
            here.read_head(address, "k", idle_timeout_s=PATIENT_S)
        answering.result()


GIANT = struct.pack(">BBHIQQI", Op.HEAD_IS, 0, 0, 1, 0, 0, MAX_ANSWER_PAYLOAD_BYTES + 1)
WRONG = {
    "a giant head": (GIANT, "at most"),
    "another request's": (Frame(op=Op.HEAD_IS, request_id=4711).encode(), "was not made"),
    "another answer": (range_frame(Op.DATA, 1, 0, 4, of_bytes=4).encode(), "something else than the head"),
}


@contextmanager
def answering(words: bytes) -> Iterator[bytes]:
    """The address of a peer that answers its first request with these words, and waits."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.settimeout(PATIENT_S)  # a client that keeps the link is to fail, not to hang
                sock.recv(HELLO_BYTES, socket.MSG_WAITALL)
                sock.sendall(WELCOME)
                sock.recv(1)
                sock.sendall(words)
                with suppress(ConnectionResetError):  # some of the words were not read
                    while sock.recv(4096):
                        pass

        answered = threads.submit(answer)
        port = listening.getsockname()[1]
        yield Address(host="127.0.0.1", port=port, token=bytes(TOKEN_BYTES)).encode()
        answered.result()


@pytest.mark.parametrize(("words", "says"), WRONG.values(), ids=WRONG.keys())
def test_an_answer_that_makes_no_sense_is_refused(here: TcpTransport, words: bytes, says: str) -> None:
    with answering(words) as address:
        with pytest.raises(BadPeerError, match=says):
            here.read_head(address, "k", idle_timeout_s=PATIENT_S)
        assert here.pool.num_connections == 0


@pytest.mark.parametrize(
    "words",
    [
        range_frame(Op.DATA, 1, 0, 3, of_bytes=4).encode(),
        range_frame(Op.DATA, 1, 1, 4, of_bytes=4).encode(),
        range_frame(Op.DATA, 1, 0, 4, of_bytes=5).encode(),
        Frame(op=Op.HEAD_IS, request_id=1, end=4, payload=bytes(8)).encode(),
    ],
    ids=["a part", "another part", "of a longer body", "a head"],
)
def test_another_body_than_was_asked_for_is_refused(here: TcpTransport, words: bytes) -> None:
    with answering(words + bytes(4)) as address:
        with pytest.raises(BadPeerError, match="something else than the body"):
            fetch(here, address, "k", Fetched(4))
        assert here.pool.num_connections == 0
