"""The test double keeps the protocol, and its faults happen at their bytes and no others."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import AlreadyExistsError
from loraserve.transport.base import (
    BadPeerError,
    FetchStoppedError,
    NotPublishedError,
    PeerGoneError,
    PeerSlowError,
    TransportError,
)
from loraserve.transport.memory import Fault, FaultKind, MemoryNet, MemoryTransport
from tests.support.transport_kit import PATIENT_S, Fetched, fetch, memory_region, pattern

PIECE_BYTES = 10
BODY = pattern(95)


@pytest.fixture
def ends() -> Iterator[tuple[MemoryTransport, MemoryTransport]]:
    """Two ends that reach each other; nothing is in use at the end."""
    net = MemoryNet(piece_bytes=PIECE_BYTES)
    here, there = net.open("here"), net.open("there")
    there.publish("k", memory_region(BODY))
    yield here, there
    assert here.active_bytes() == there.active_bytes() == 0


Ends = tuple[MemoryTransport, MemoryTransport]


@given(st.integers(0, 60), st.integers(1, 70), st.booleans())
def test_what_is_fetched_is_what_was_published(size_bytes: int, piece_bytes: int, backwards: bool) -> None:
    net = MemoryNet(piece_bytes=piece_bytes, backwards=backwards)
    here, there = net.open(), net.open()
    there.publish("k", memory_region(pattern(size_bytes), b"a head"))
    assert here.read_head(there.address, "k", idle_timeout_s=1) == (b"a head", size_bytes)
    got = fetch(here, there.address, "k", Fetched(size_bytes))
    assert got.body == pattern(size_bytes)
    assert got.covered()
    assert got.ranges == sorted(got.ranges, reverse=backwards)
    assert (there.heads_read["k"], there.bodies_read["k"]) == (1, 1)


@given(st.sampled_from([FaultKind.DIE, FaultKind.SHORT]), st.integers(0, len(BODY)))
def test_a_body_ends_at_the_faults_byte(kind: FaultKind, at_byte: int) -> None:
    net = MemoryNet(piece_bytes=PIECE_BYTES)
    here, there = net.open(), net.open()
    there.publish("k", memory_region(BODY))
    fault = there.inject(Fault(kind=kind, at_byte=at_byte, times=1))
    got = Fetched(len(BODY))
    with pytest.raises(
        PeerGoneError if kind is FaultKind.DIE else BadPeerError, match=f"after {at_byte} bytes"
    ):
        fetch(here, there.address, "k", got)
    assert fault.reached.is_set()
    assert got.body == BODY[:at_byte] + bytes(len(BODY) - at_byte)
    assert sum(end - begin for begin, end in got.ranges) <= at_byte
    assert fetch(here, there.address, "k", Fetched(len(BODY))).body == BODY


@given(st.integers(0, len(BODY) - 1), st.booleans())
def test_one_bit_is_another(at_byte: int, backwards: bool) -> None:
    net = MemoryNet(piece_bytes=PIECE_BYTES, backwards=backwards)
    here, there = net.open(), net.open()
    there.publish("k", memory_region(BODY))
    there.inject(Fault(kind=FaultKind.FLIP, at_byte=at_byte, key="k"))
    there.inject(Fault(kind=FaultKind.FLIP, at_byte=at_byte, key="other"))
    got = fetch(here, there.address, "k", Fetched(len(BODY)))
    assert got.covered()
    assert [at for at in range(len(BODY)) if got.body[at] != BODY[at]] == [at_byte]
    assert got.body[at_byte] ^ BODY[at_byte] == 1


@pytest.mark.parametrize("at_byte", [0, 37, len(BODY)])
def test_a_stall_ends_by_release_by_stop_or_by_time(ends: Ends, at_byte: int) -> None:
    here, there = ends
    fault = there.inject(Fault(kind=FaultKind.STALL, at_byte=at_byte))
    with ThreadPoolExecutor(1) as threads:
        got = Fetched(len(BODY))
        fetching = threads.submit(fetch, here, there.address, "k", got)
        assert fault.reached.wait(PATIENT_S)
        assert got.body[:at_byte] == BODY[:at_byte]
        assert not fetching.done()
        fault.release.set()
        assert fetching.result().body == BODY
    there.heal()
    there.inject(Fault(kind=FaultKind.STALL, at_byte=at_byte))
    with pytest.raises(PeerSlowError, match=r"sent nothing for 0\.02 s"):
        fetch(here, there.address, "k", Fetched(len(BODY)), idle_timeout_s=0.02)
    stop = threading.Event()
    got = Fetched(len(BODY))
    got.at_first = stop.set
    with pytest.raises(FetchStoppedError):
        fetch(here, there.address, "k", got, stop=stop.is_set if at_byte else lambda: True)
    there.heal()
    assert fetch(here, there.address, "k", Fetched(len(BODY))).body == BODY


@pytest.mark.parametrize(
    ("kind", "error"), [(FaultKind.REFUSE, PeerGoneError), (FaultKind.NOT_PUBLISHED, NotPublishedError)]
)
def test_a_peer_can_refuse(ends: Ends, kind: FaultKind, error: type[TransportError]) -> None:
    here, there = ends
    there.inject(Fault(kind=kind, times=2))
    with pytest.raises(error):
        here.read_head(there.address, "k", idle_timeout_s=1)
    with pytest.raises(error):
        fetch(here, there.address, "k", Fetched(len(BODY)))
    assert fetch(here, there.address, "k", Fetched(len(BODY))).body == BODY


@pytest.mark.parametrize("head", [b"", b"head"])
def test_a_head_can_be_wrong(ends: Ends, head: bytes) -> None:
    here, there = ends
    there.publish("h", memory_region(b"", head))
    there.inject(Fault(kind=FaultKind.WRONG_HEAD))
    assert here.read_head(there.address, "h", idle_timeout_s=1)[0] != head
    there.heal()
    assert here.read_head(there.address, "h", idle_timeout_s=1)[0] == head


def test_a_closed_end_serves_and_fetches_nothing(ends: Ends) -> None:
    here, there = ends
    got = Fetched(len(BODY))
    got.at_first = there.close
    with pytest.raises(PeerGoneError):
        fetch(here, there.address, "k", got)
    with pytest.raises(PeerGoneError):
        here.read_head(there.address, "k", idle_timeout_s=1)
    with pytest.raises(FetchStoppedError):
        there.read_head(here.address, "k", idle_timeout_s=1)
    with pytest.raises(PeerGoneError):
        here.read_head(b"nobody#1", "k", idle_timeout_s=1)


def test_what_is_withdrawn_while_it_is_read_arrives_whole(ends: Ends) -> None:
    here, there = ends
    got = Fetched(len(BODY))
    got.at_first = lambda: there.withdraw("k")
    assert fetch(here, there.address, "k", got).body == BODY
    with pytest.raises(NotPublishedError):
        fetch(here, there.address, "k", Fetched(len(BODY)))


def test_keys_are_unique_and_lengths_are_checked(ends: Ends) -> None:
    here, there = ends
    with pytest.raises(AlreadyExistsError):
        there.publish("k", memory_region(BODY))
    with pytest.raises(BadPeerError, match="has 95 bytes, not 94"):
        fetch(here, there.address, "k", Fetched(len(BODY) - 1))
