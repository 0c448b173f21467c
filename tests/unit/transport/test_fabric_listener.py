"""A listener serves its own, turns strangers away in bounded time, and lets none cost the others anything."""

import logging
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest

from loraserve.errors import AlreadyExistsError, BadInputError, UnavailableError
from loraserve.transport.address import Address
from loraserve.transport.base import (
    MAX_KEY_BYTES,
    BadPeerError,
    NotPublishedError,
    PeerBusyError,
    PeerFailedError,
    PeerGoneError,
    Region,
    TransportError,
)
from loraserve.transport.link import Patience
from loraserve.transport.listener import Connection, Listener, ListenerLimits
from loraserve.transport.peers import PeerPool
from loraserve.transport.strangers import BURST, PERIOD_S, Strangers
from loraserve.transport.tcp import read_head
from loraserve.transport.wire import (
    FIRST_SCHEME_OP,
    MAX_REQUEST_PAYLOAD_BYTES,
    WELCOME,
    Frame,
    Op,
    encode_hello,
)
from tests.support.transport_kit import PATIENT_S, eventually, memory_region, nothing_leaks

PATIENCE = Patience(idle_s=PATIENT_S)
OP = FIRST_SCHEME_OP
HASTY = ListenerLimits(hello_s=0.05)


@contextmanager
def listening(
    on_missing: Callable[[str], Region | None] | None = None, limits: ListenerLimits | None = None
) -> Iterator[tuple[Listener, PeerPool]]:
    """A listener that serves key "k" over scheme "s", and a client; nothing is left of them."""
    with nothing_leaks():
        listener, pool = Listener("127.0.0.1", on_missing=on_missing, limits=limits), PeerPool()
        listener.join("s")
        listener.publish("s", "k", memory_region(b"body"))
        try:
            yield listener, pool
        finally:
            pool.close()
            listener.close()
            listener.close()


def head(listener: Listener, pool: PeerPool, key: str = "k", *, scheme: str = "s") -> bytes:
    """The head that the listener tells of a key."""
    return read_head(pool, listener.address, key, scheme=scheme, patience=PATIENCE)[0]


def ask(listener: Listener, pool: PeerPool, request: Frame) -> Frame:
    """The one frame that answers a request."""
    with pool.exchange(listener.address, request, PATIENCE, is_body=False) as (link, answer):
        link.settled = True
        return answer


@contextmanager
def stranger(listener: Listener) -> Iterator[socket.socket]:
    """A plain connection."""
    with socket.create_connection(("127.0.0.1", listener.port), timeout=PATIENT_S) as sock:
        yield sock


def turned_away(sock: socket.socket) -> bool:
    """Wait until the listener has closed a connection."""
    with suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return True


NONSENSE = {
    "http": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "random bytes": random.Random(8).randbytes(100_000),
    "half a hello": b"LoRAFab\x01\x00",
    "another version": struct.pack(">8sH16s", WELCOME[:8], 99, bytes(16)),
    "nothing": b"",
}


@pytest.mark.parametrize("words", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_stranger_is_turned_away_with_one_line(words: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with listening(limits=HASTY) as (listener, pool):
        with stranger(listener) as sock:
            with suppress(ConnectionError):  # it may have heard enough
                sock.sendall(words)
            assert head(listener, pool) == b"head"
            assert turned_away(sock)
        eventually(lambda: bool(caplog.records), "a log line")
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "turned away a connection from 127.0.0.1:" in caplog.text
        assert caplog.text.count("\n") == 1


GIANTS = {
    "a giant key": struct.pack(">BBHIQQI", Op.HEAD, 0, 0xFFFF, 1, 0, 0, 0),
    "a giant payload": struct.pack(">BBHIQQI", Op.HEAD, 0, 1, 1, 0, 0, 0xFFFFFFFF),
    "a giant payload for another op": struct.pack(
        ">BBHIQQI", 99, 0, 0, 1, 0, 0, MAX_REQUEST_PAYLOAD_BYTES + 1
    ),
    "an op that means nothing": bytes(28),
    "a key that is no text": struct.pack(">BBHIQQI", Op.HEAD, 0, 1, 1, 0, 0, 0) + b"\xff",
}


@pytest.mark.parametrize("words", GIANTS.values(), ids=GIANTS.keys())
def test_nonsense_after_a_right_hello_ends_the_connection(
    words: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with listening() as (listener, pool):
        with stranger(listener) as sock:
            sock.sendall(encode_hello(listener.token) + words)
            assert sock.recv(len(WELCOME), socket.MSG_WAITALL) == WELCOME
            assert turned_away(sock)
        assert head(listener, pool) == b"head"
        eventually(lambda: len(caplog.records) == 1, "a log line")


def test_a_frame_that_does_not_end_ends_its_connection() -> None:
    with listening(limits=HASTY) as (listener, pool), stranger(listener) as sock:
        sock.sendall(encode_hello(listener.token) + Frame(op=Op.HEAD, key="k" * MAX_KEY_BYTES).encode()[:-1])
        assert turned_away(sock)
        assert head(listener, pool) == b"head"


def test_an_idle_connection_is_closed_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with listening(limits=ListenerLimits(idle_s=0.05)) as (listener, _), stranger(listener) as sock:
        sock.sendall(encode_hello(listener.token))
        assert turned_away(sock)
        eventually(lambda: listener.num_connections == 0, "the end of the connection")
        assert not caplog.records


def test_many_strangers_make_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [0.0]
    strangers = Strangers(lambda: now_s[0])
    for number in range(BURST + 30):
        strangers.turned_away(f"1.2.3.4:{number}", "noise")
    assert len(caplog.records) == BURST
    now_s[0] = PERIOD_S
    strangers.turned_away("1.2.3.4:99", "noise")
    assert len(caplog.records) == BURST + 1
    assert "(and 30 before, not logged)" in caplog.records[-1].getMessage()


def test_one_connection_too_many_is_told_so_and_may_come_again() -> None:
    with listening(limits=ListenerLimits(max_connections=3)) as (listener, pool), ExitStack() as others:
        held = [others.enter_context(stranger(listener)) for _ in range(3)]
        for sock in held:
            sock.sendall(encode_hello(listener.token))
            assert sock.recv(len(WELCOME), socket.MSG_WAITALL) == WELCOME
        with pytest.raises(PeerBusyError, match="as many connections as it may"):
            head(listener, pool)
        held[0].close()
        eventually(lambda: listener.num_connections == 2, "room")
        assert head(listener, pool) == b"head"


def test_silent_strangers_give_way_to_who_says_hello() -> None:
    limits = ListenerLimits(max_connections=6, max_silent=4, hello_s=PATIENT_S)
    with listening(limits=limits) as (listener, pool), ExitStack() as others:
        socks = [others.enter_context(stranger(listener)) for _ in range(4)]
        eventually(lambda: listener.num_connections == 4, "four strangers")
        assert head(listener, pool) == b"head"
        assert turned_away(socks[0]), "the first to come is the first to go"
        eventually(lambda: listener.num_connections == 4, "three strangers and a client")
        for _ in range(20):
            others.enter_context(stranger(listener))
            eventually(lambda: listener.num_connections <= 5, "no more than four strangers and a client")
        assert head(listener, pool) == b"head"
        assert pool.num_opened == 1, "who has said hello stays"


def test_a_hundred_silent_strangers_leave_when_their_time_is_up() -> None:
    with listening(limits=HASTY) as (listener, pool), ExitStack() as others:
        socks = [others.enter_context(stranger(listener)) for _ in range(100)]
        assert all(turned_away(sock) for sock in socks)
        assert head(listener, pool) == b"head"


def test_schemes_do_not_see_each_others_regions() -> None:
    with listening() as (listener, pool):
        listener.join("other")
        listener.publish("other", "k", memory_region(b"body", b"another head"))
        assert head(listener, pool) == b"head"
        assert head(listener, pool, scheme="other") == b"another head"
        with pytest.raises(NotPublishedError):
            head(listener, pool, scheme="\u00e4" * 40)
        listener.leave("other")
        listener.leave("other")
        with pytest.raises(NotPublishedError):
            head(listener, pool, scheme="other")
        assert head(listener, pool) == b"head"


def test_the_last_scheme_to_leave_closes_the_listener() -> None:
    with listening() as (listener, pool):
        listener.leave("s")
        with pytest.raises(PeerGoneError):
            head(listener, pool)
        with pytest.raises(UnavailableError):
            listener.join("s")


def test_a_scheme_has_the_ops_that_it_handles_until_it_leaves() -> None:
    def echo(connection: Connection, request: Frame) -> None:
        connection.send(Frame(op=OP, request_id=request.request_id, payload=request.payload[::-1]))

    with listening() as (listener, pool):
        listener.join("echo", {OP: echo})
        assert ask(listener, pool, Frame(op=OP, payload=b"abc")).payload == b"cba"
        with pytest.raises(AlreadyExistsError):
            listener.handle(OP, echo, scheme="s")
        with pytest.raises(AlreadyExistsError):
            listener.handle(Op.HEAD, echo, scheme="s")
        with pytest.raises(AlreadyExistsError):
            listener.join("echo")
        listener.leave("echo")
        opened = pool.num_opened
        for _ in range(2):
            with pytest.raises(BadPeerError, match=f"op {OP} is not served here"):
                ask(listener, pool, Frame(op=OP))
        assert pool.num_opened <= opened + 1  # `leave` may have ended the one that echoed just now


def test_a_handler_may_hold_a_conversation() -> None:
    def add(connection: Connection, request: Frame) -> None:
        connection.send(request)
        total = 0
        while number := connection.receive().begin:
            total += number
        connection.send(Frame(op=OP, request_id=request.request_id, end=total))

    with listening() as (listener, pool):
        listener.handle(OP, add, scheme="s")
        with pool.exchange(listener.address, Frame(op=OP), PATIENCE, is_body=True) as (link, answer):
            for number in (1, 2, 3, 0):
                link.send(Frame(op=OP, begin=number), PATIENCE)
            assert link.receive(PATIENCE, 0) == Frame(op=OP, request_id=answer.request_id, end=6)
            link.settled = True


@pytest.mark.parametrize(
    ("error", "kind", "logged"),
    [
        (NotPublishedError("not any more"), NotPublishedError, 0),
        (BadPeerError("what is that"), BadPeerError, 0),
        (TransportError("no room"), PeerFailedError, 0),
        (KeyError("a defect"), PeerFailedError, 1),
        (PeerGoneError("it has left"), PeerGoneError, 0),
    ],
)
def test_what_a_handler_raises_is_told_to_the_client(
    error: Exception, kind: type[TransportError], logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(connection: Connection, request: Frame) -> None:
        raise error

    with listening() as (listener, pool):
        listener.handle(OP, fail, scheme="s")
        with pytest.raises(TransportError) as raised:
            ask(listener, pool, Frame(op=OP, key="k"))
        assert type(raised.value) is kind
        assert len(caplog.records) == logged
        assert head(listener, pool) == b"head"


def test_a_scheme_that_leaves_ends_what_it_serves_now() -> None:
    serving, ended = threading.Event(), threading.Event()

    def serve_long(connection: Connection, request: Frame) -> None:
        serving.set()
        try:
            connection.receive()
        finally:
            ended.set()

    with listening() as (listener, pool), ThreadPoolExecutor(1) as threads:
        listener.join("long", {OP: serve_long})
        asking = threads.submit(ask, listener, pool, Frame(op=OP))
        assert serving.wait(PATIENT_S)
        listener.leave("long")
        assert ended.is_set()
        assert isinstance(asking.exception(PATIENT_S), PeerGoneError)
        assert head(listener, pool) == b"head"


def test_a_missing_region_is_made_once_for_all_who_ask_meanwhile() -> None:
    asked, go_on = threading.Semaphore(0), threading.Event()
    made: list[str] = []

    def make(key: str) -> Region | None:
        made.append(key)
        assert go_on.wait(PATIENT_S)
        return memory_region(b"made", key.encode())

    limits = ListenerLimits(wait_s=0.01)
    with (
        listening(make, limits) as (listener, pool),
        ThreadPoolExecutor(8) as threads,
        ExitStack() as clients,
    ):
        pools = [PeerPool() for _ in range(8)]
        for each in pools:
            clients.callback(each.close)

        def one(each: PeerPool) -> bytes:
            asked.release()
            return head(listener, each, "new")

        answers = [threads.submit(one, each) for each in pools]
        for _ in pools:
            assert asked.acquire(timeout=PATIENT_S)
        eventually(lambda: listener.num_connections == 8, "all connections")
        assert head(listener, pool) == b"head"  # what is there is served meanwhile
        go_on.set()
        assert {answer.result() for answer in answers} == {b"new"}
        # Who came after it was there had it made again: to keep it is the hook's own business.
        assert made.count("new") <= 8
        before = len(made)
        assert head(listener, pool, "new") == b"new"
        assert len(made) == before + 1


def test_who_waits_for_a_region_to_be_made_hears_so(caplog: pytest.LogCaptureFixture) -> None:
    patience_s, waited = 0.3, threading.Event()

    def make(key: str) -> Region | None:
        waited.wait(3 * patience_s)  # longer than the client would take silence
        return memory_region(b"made")

    with listening(make, ListenerLimits(wait_s=0.05)) as (listener, pool):
        found = read_head(pool, listener.address, "new", scheme="s", patience=Patience(idle_s=patience_s))
        assert found == (b"head", 4)
        assert pool.num_opened == 1


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (None, NotPublishedError),
        (KeyError("no such adapter"), NotPublishedError),
        (NotPublishedError("dropped"), NotPublishedError),
        (Region(head=b"", body=b"", size_bytes=9), NotPublishedError),
    ],
)
def test_a_region_that_cannot_be_made_is_told(made: Region | Exception | None, kind: type[Exception]) -> None:
    def make(key: str) -> Region | None:
        if isinstance(made, Exception):
            raise made
        return made

    with listening(make) as (listener, pool):
        for _ in range(2):
            with pytest.raises(TransportError) as raised:
                head(listener, pool, "new")
            assert type(raised.value) is kind
        assert pool.num_opened == 1


def test_closing_does_not_wait_for_a_region_that_is_being_made() -> None:
    making, go_on = threading.Event(), threading.Event()

    def make(key: str) -> Region | None:
        making.set()
        assert go_on.wait(PATIENT_S)
        return None

    with listening(make, ListenerLimits(wait_s=0.01)) as (listener, pool), ThreadPoolExecutor(1) as threads:
        asking = threads.submit(head, listener, pool, "new")
        assert making.wait(PATIENT_S)
        listener.close()
        assert listener.num_connections == 0
        go_on.set()
        assert isinstance(asking.exception(PATIENT_S), PeerGoneError)


def test_a_client_of_another_life_is_refused() -> None:
    with listening() as (listener, pool):
        other = Address(host="127.0.0.1", port=listener.port, token=bytes(16)).encode()
        with pytest.raises(PeerGoneError, match="another one has its port"):
            read_head(pool, other, "k", scheme="s", patience=PATIENCE)
        eventually(lambda: listener.num_connections == 0, "the end of the connection")


def test_only_the_host_that_is_given_is_listened_on() -> None:
    with listening() as (listener, _):
        assert listener.address.startswith(b"127.0.0.1:")
        with pytest.raises(BadInputError, match=rf"cannot listen on 127.0.0.1:{listener.port}: "):
            Listener("127.0.0.1", listener.port)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_works_too() -> None:
    with nothing_leaks():
        try:
            listener = Listener("::1")
        except BadInputError as error:
            pytest.skip(f"no IPv6 loopback here: {error}")
        listener.join("s")
        listener.publish("s", "k", memory_region(b"body"))
        pool = PeerPool()
        assert head(listener, pool) == b"head"
        pool.close()
        listener.close()
