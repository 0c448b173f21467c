"""Over tcp the bytes that arrive are those that were published, whatever goes on beside them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.errors import AlreadyExistsError, BadInputError, UnavailableError
from loraserve.pace import Pace
from loraserve.transport.address import Address
from loraserve.transport.base import (
    MAX_HEAD_BYTES,
    MAX_KEY_BYTES,
    BadPeerError,
    FetchStoppedError,
    NotPublishedError,
    PeerGoneError,
    PeerSlowError,
    Region,
    TransportError,
)
from loraserve.transport.link import Patience
from loraserve.transport.listener import Listener, ListenerLimits
from loraserve.transport.peers import PeerPool
from loraserve.transport.tcp import PIECE_BYTES, TcpTransport
from loraserve.transport.wire import Op, range_frame
from tests.support.transport_kit import (
    PATIENT_S,
    Fetched,
    eventually,
    fetch,
    file_region,
    memory_region,
    nothing_leaks,
    pattern,
)

Ends = tuple[TcpTransport, TcpTransport]
Make = Callable[..., Region]
SIZES = [0, 1, 4097, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 67 * 1024**2 + 3]
BOTH = pytest.mark.parametrize("region_of", [memory_region, file_region])
LARGE_BYTES = 64 * 1024**2
"""More than the buffers of two sockets take, so that a transfer can be caught in the middle."""


@BOTH
@pytest.mark.parametrize("size_bytes", SIZES)
def test_what_is_fetched_is_what_was_published(ends: Ends, region_of: Make, size_bytes: int) -> None:
    here, there = ends
    body = pattern(size_bytes)
    there.publish("k", region_of(body, b"a head"))
    assert here.read_head(there.address, "k", idle_timeout_s=PATIENT_S) == (b"a head", size_bytes)
    got = fetch(here, there.address, "k", Fetched(size_bytes))
    assert got.body == body
    assert got.covered()


def test_bodies_come_in_as_short_pieces_as_is_asked_for(ends: Ends) -> None:
    here, there = ends
    there.publish("k", memory_region(pattern(10_000)))
    here.piece_bytes = 3000
    got = fetch(here, there.address, "k", Fetched(10_000))
    assert got.body == pattern(10_000)
    assert [end - begin for begin, end in got.ranges] == [3000, 3000, 3000, 1000]


def test_who_sends_keeps_a_pace_piece_by_piece(ends: Ends) -> None:
    """However long the pieces are that the other side wants."""
    here, there = ends
    asked: list[str] = []

    def is_busy() -> bool:
        asked.append(threading.current_thread().name)
        return False

    there.publish("k", memory_region(pattern(10_000)))
    there.piece_bytes, there.pace = 3000, Pace(is_busy=is_busy)
    assert fetch(here, there.address, "k", Fetched(10_000)).body == pattern(10_000)
    # The first rest of a thread only begins to count, and the last may come after the fetch.
    assert len(asked) >= 2
    assert threading.current_thread().name not in asked


def test_heads_may_be_empty_or_as_large_as_they_may_be(ends: Ends) -> None:
    here, there = ends
    for key, head in (("none", b""), ("large", pattern(MAX_HEAD_BYTES))):
        there.publish(key, memory_region(b"body", head))
        assert here.read_head(there.address, key, idle_timeout_s=PATIENT_S) == (head, 4)


def test_regions_are_told_apart_by_their_keys(ends: Ends) -> None:
    here, there = ends
    keys = ["a@1", "a@2", "ä" * (MAX_KEY_BYTES // 2)]
    for seed, key in enumerate(keys):
        there.publish(key, memory_region(pattern(1000, seed), key.encode()))
    for seed, key in enumerate(keys):
        assert here.read_head(there.address, key, idle_timeout_s=PATIENT_S)[0] == key.encode()
        assert fetch(here, there.address, key, Fetched(1000)).body == pattern(1000, seed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data(), from_file=st.booleans())
def test_any_range_is_served_exactly(ends: Ends, data: st.DataObject, from_file: bool) -> None:
    _, there = ends
    body = pattern(300_000)
    begin = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(begin, len(body)))
    there.withdraw("k")
    there.publish("k", file_region(body) if from_file else memory_region(body))
    pool, patience = PeerPool(), Patience(idle_s=PATIENT_S)
    request = range_frame(Op.BODY, 0, begin, end, of_bytes=len(body), key="k")
    with pool.exchange(there.address, request, patience, is_body=True) as (link, answer):
        assert (answer.begin, answer.end) == (begin, end)
        assert link.receive_exactly(end - begin, patience) == body[begin:end]
        link.settled = True
    pool.close()


def test_what_is_not_published_is_refused_and_the_connection_stays(ends: Ends) -> None:
    here, there = ends
    there.publish("k", memory_region(b"body"))
    for _ in range(3):
        with pytest.raises(NotPublishedError, match="other is not published"):
            here.read_head(there.address, "other", idle_timeout_s=PATIENT_S)
        with pytest.raises(NotPublishedError, match="other is not published"):
            fetch(here, there.address, "other", Fetched(4))
        fetch(here, there.address, "k", Fetched(4))
    there.withdraw("k")
    there.withdraw("k")
    with pytest.raises(NotPublishedError):
        fetch(here, there.address, "k", Fetched(4))
    assert here.pool.num_connections == 2
    assert here.pool.num_opened == 2


@pytest.mark.parametrize("size_bytes", [0, 3, 5, 2**40])
def test_another_length_than_the_bodys_is_refused(ends: Ends, size_bytes: int) -> None:
    here, there = ends
    there.publish("k", memory_region(b"body"))
    request = range_frame(Op.BODY, 0, 0, size_bytes, of_bytes=size_bytes, key="k")
    with (
        pytest.raises(BadPeerError, match=f"has 4 bytes, not {size_bytes}"),
        here.pool.exchange(there.address, request, Patience(idle_s=PATIENT_S), is_body=True),
    ):
        pytest.fail("it was answered")


def test_a_destination_that_cannot_be_written_is_refused(ends: Ends) -> None:
    here, there = ends
    there.publish("k", memory_region(b"body"))
    with pytest.raises(ValueError, match="cannot be written"):
        here.fetch(
            there.address, "k", b"body", on_bytes=lambda *_: None, idle_timeout_s=1, stop=lambda: False
        )


def test_a_key_is_published_once(ends: Ends) -> None:
    _, there = ends
    there.publish("k", memory_region(b"body"))
    with pytest.raises(AlreadyExistsError, match="k is published over tcp already"):
        there.publish("k", memory_region(b"other"))
    there.withdraw("k")
    there.publish("k", memory_region(b"other"))


class OnDevice:
    """Looks like memory of a GPU."""

    __cuda_array_interface__ = None


@pytest.mark.parametrize(
    ("key", "region"),
    [
        ("", memory_region(b"body")),
        ("k" * (MAX_KEY_BYTES + 1), memory_region(b"body")),
        ("k", memory_region(b"body", bytes(MAX_HEAD_BYTES + 1))),
        ("k", Region(head=b"", body=b"body", size_bytes=5)),
        ("k", Region(head=b"", body=OnDevice(), size_bytes=4)),
    ],
)
def test_a_region_that_peers_could_not_be_told_of_is_refused(ends: Ends, key: str, region: Region) -> None:
    with pytest.raises(BadInputError):
        ends[1].publish(key, region)


def test_two_hundred_fetches_at_once_share_few_connections(ends: Ends) -> None:
    here, there = ends
    bodies = {f"k{seed}": pattern(50_000 + seed, seed) for seed in range(20)}
    for key, body in bodies.items():
        there.publish(key, file_region(body))

    def one(number: int) -> bool:
        key = f"k{number % len(bodies)}"
        return fetch(here, there.address, key, Fetched(len(bodies[key]))).body == bodies[key]

    with ThreadPoolExecutor(200) as threads:
        assert all(threads.map(one, range(200)))
    assert here.pool.num_opened <= 4
    assert there.listener.num_connections <= 4
    eventually(lambda: there.active_bytes() == 0, "the server's end of the last fetch")


def test_a_body_that_is_withdrawn_while_it_is_read_arrives_whole(ends: Ends) -> None:
    here, there = ends
    body = pattern(LARGE_BYTES)
    there.publish("k", file_region(body))
    got = Fetched(LARGE_BYTES)

    def replace() -> None:
        there.withdraw("k")
        there.publish("k", file_region(bytes(LARGE_BYTES)))
        assert there.active_bytes() == LARGE_BYTES

    got.at_first = replace
    assert fetch(here, there.address, "k", got).body == body


@BOTH
def test_a_server_that_closes_in_the_middle_ends_the_fetch(ends: Ends, region_of: Make) -> None:
    here, there = ends
    there.publish("k", region_of(pattern(LARGE_BYTES)))
    got = Fetched(LARGE_BYTES)
    got.at_first = there.close
    with pytest.raises(PeerGoneError):
        fetch(here, there.address, "k", got)
    assert here.active_bytes() == 0
    assert not got.covered()


def test_closing_ends_ones_own_fetches(ends: Ends) -> None:
    here, there = ends
    there.publish("k", file_region(pattern(LARGE_BYTES)))
    got = Fetched(LARGE_BYTES)
    got.at_first = here.close
    with pytest.raises(FetchStoppedError):
        fetch(here, there.address, "k", got)
    with pytest.raises(FetchStoppedError):
        here.read_head(there.address, "k", idle_timeout_s=PATIENT_S)
    with pytest.raises(UnavailableError):
        here.publish("k", memory_region(b""))
    eventually(lambda: there.active_bytes() == 0, "the server's end of the fetch")


def test_a_stop_ends_a_fetch_in_the_middle(ends: Ends) -> None:
    here, there = ends
    there.publish("k", file_region(pattern(LARGE_BYTES)))
    got = Fetched(LARGE_BYTES)
    with pytest.raises(FetchStoppedError):
        fetch(here, there.address, "k", got, stop=lambda: bool(got.ranges))
    assert len(got.ranges) == 1
    assert here.active_bytes() == 0
    eventually(lambda: there.active_bytes() == 0, "the server's end of the fetch")
    assert fetch(here, there.address, "k", Fetched(LARGE_BYTES)).covered()


def test_what_the_progress_raises_ends_the_fetch(ends: Ends) -> None:
    here, there = ends
    there.publish("k", file_region(pattern(LARGE_BYTES)))
    got = Fetched(LARGE_BYTES)

    def refuse() -> None:
        raise KeyError("a wrong hash")

    got.at_first = refuse
    with pytest.raises(KeyError, match="a wrong hash"):
        fetch(here, there.address, "k", got)
    assert fetch(here, there.address, "k", Fetched(LARGE_BYTES)).covered()


def test_nothing_is_written_after_a_fetch_has_ended(ends: Ends) -> None:
    here, there = ends
    there.publish("k", file_region(b"\1" * LARGE_BYTES))
    got = Fetched(LARGE_BYTES)
    with pytest.raises(FetchStoppedError):
        fetch(here, there.address, "k", got, stop=lambda: bool(got.ranges))
    got.body[:] = bytes(LARGE_BYTES)
    fetch(here, there.address, "k", Fetched(LARGE_BYTES))
    assert not any(got.body)
    got.body.clear()  # BufferError if anybody still held a view


def test_a_process_that_took_over_a_port_is_not_mistaken_for_the_one_before(ends: Ends) -> None:
    here, there = ends
    there.publish("k", memory_region(b"new"))
    now = Address.decode(there.address)
    before = Address(host=now.host, port=now.port, token=bytes(len(now.token)))
    with pytest.raises(PeerGoneError, match="another one has its port"):
        here.read_head(before.encode(), "k", idle_timeout_s=PATIENT_S)


def test_a_connection_that_the_peer_closed_while_it_was_idle_is_replaced() -> None:
    with nothing_leaks():
        here = TcpTransport(Listener("127.0.0.1"))
        there = TcpTransport(Listener("127.0.0.1", limits=ListenerLimits(idle_s=0.01)))
        there.publish("k", memory_region(b"body"))
        for _ in range(3):
            assert fetch(here, there.address, "k", Fetched(4)).body == b"body"
            eventually(lambda: there.listener.num_connections == 0, "the end of what is idle")
        assert here.pool.num_opened == 3
        here.close()
        there.close()


def test_connections_that_are_idle_for_long_are_closed(ends: Ends) -> None:
    _, there = ends
    there.publish("k", memory_region(b"body"))
    here = TcpTransport(Listener("127.0.0.1"), PeerPool(keep_idle_s=0.0))
    here.read_head(there.address, "k", idle_timeout_s=PATIENT_S)
    fetch(here, there.address, "k", Fetched(4))
    eventually(lambda: there.listener.num_connections <= 1, "the end of what is idle")
    assert here.pool.num_connections <= 1
    here.close()


def test_who_waits_for_a_connection_waits_while_bytes_come_and_not_longer(ends: Ends) -> None:
    _, there = ends
    there.publish("k", file_region(pattern(LARGE_BYTES)))
    here = TcpTransport(Listener("127.0.0.1"), PeerPool(max_bodies=1))
    first, held, released = Fetched(LARGE_BYTES), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert released.wait(PATIENT_S)

    first.at_first = hold
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(fetch, here, there.address, "k", first)
        assert held.wait(PATIENT_S)
        with pytest.raises(PeerSlowError, match="all 1 connections did nothing"):
            fetch(here, there.address, "k", Fetched(LARGE_BYTES), idle_timeout_s=0.1)
        with pytest.raises(FetchStoppedError):
            fetch(here, there.address, "k", Fetched(LARGE_BYTES), stop=lambda: True)
        here.read_head(there.address, "k", idle_timeout_s=PATIENT_S)  # no body is in its way
        waiting = threads.submit(fetch, here, there.address, "k", Fetched(LARGE_BYTES))
        released.set()
        assert running.result().covered()
        assert waiting.result().covered()
    here.close()


def test_nobody_at_an_address_is_one_clear_error(ends: Ends) -> None:
    here, there = ends
    address = there.address
    there.close()
    with pytest.raises(PeerGoneError, match="cannot be reached: Connection refused"):
        here.read_head(address, "k", idle_timeout_s=PATIENT_S)
    for nonsense in (b"", b"\xff", b"nowhere", b"127.0.0.1:1/zz"):
        with pytest.raises(BadPeerError, match="is no address"):
            here.read_head(nonsense, "k", idle_timeout_s=PATIENT_S)


def test_a_file_that_is_shorter_than_its_region_ends_the_connection_not_the_server(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = ends
    whole = file_region(b"body")
    there.publish(
        "k", Region(head=b"", body=b"x" * 100, size_bytes=100, fd=whole.fd, owner=whole, fd_offset=4096)
    )
    with pytest.raises(TransportError):
        fetch(here, there.address, "k", Fetched(100))
    there.publish("whole", whole)
    assert fetch(here, there.address, "whole", Fetched(4)).body == b"body"
    assert "the body of 'k' could not be sent" in caplog.text
