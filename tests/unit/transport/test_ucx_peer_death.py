"""A peer of scheme `ucx` that dies or stops is one clear error, and writes nothing after it."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from loraserve.transport.base import FetchStoppedError, PeerGoneError, PeerSlowError
from loraserve.transport.listener import Listener
from loraserve.transport.ucx import UcxTransport, open_ucx
from tests.support.adapter_maker import one_line
from tests.support.transport_kit import Fetched, eventually, fetch, nothing_leaks
from tests.support.ucx_peer import UcxPeer, die_while_fetching, large_pattern, peers_by_way, ucx_peer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="needs ucxx: scripts/setup installs it where it can"
)
WAYS = pytest.mark.parametrize("tls", ["", "tcp,self"], ids=["shared-memory", "tcp"])
CHUNK_BYTES = 1024**2
SIZE_BYTES = 12 * CHUNK_BYTES + 5


@cache
def body() -> bytes:
    """What every peer here serves."""
    return large_pattern(SIZE_BYTES)


@pytest.fixture(scope="module")
def peers() -> Iterator[Callable[[str], UcxPeer]]:
    """Peers that nothing happens to, by UCX_TLS."""
    with peers_by_way(SIZE_BYTES) as found:
        yield found


@pytest.fixture
def here(tls: str) -> Iterator[UcxTransport]:
    transport = open_ucx(Listener("127.0.0.1"), tls=tls or None, chunk_bytes=CHUNK_BYTES)
    yield transport
    assert transport.active_bytes() == 0
    transport.close()


class CutShort(Fetched):
    """Sends a signal to the peer once a chunk is there."""

    def __init__(self, at_chunk: int, number: int, peer: UcxPeer) -> None:
        super().__init__(SIZE_BYTES)
        self._begin, self._number, self._peer = at_chunk * CHUNK_BYTES, number, peer

    def on_bytes(self, begin: int, end: int) -> None:
        super().on_bytes(begin, end)
        if begin == self._begin:
            self._peer.signal(self._number)


def at_rest(peer: UcxPeer) -> bool:
    """Whether the peer reads none of its regions any more."""
    return int(peer.ask("state")["active_bytes"]) == 0


@pytest.mark.parametrize(
    ("tls", "at_chunk"), [("", 0), ("", 5), ("tcp,self", 0), ("tcp,self", 5), ("posix,self", 2)]
)
def test_a_peer_that_is_killed_ends_the_fetch_and_only_it(
    here: UcxTransport, tls: str, at_chunk: int, peers: Callable[[str], UcxPeer]
) -> None:
    with ucx_peer(SIZE_BYTES, tls=tls) as peer:
        got = CutShort(at_chunk, signal.SIGKILL, peer)
        with pytest.raises(PeerGoneError) as raised:
            fetch(here, peer.address, "k0", got)
        assert one_line(raised.value)
        assert not got.covered()
        assert all(got.body[begin:end] == body()[begin:end] for begin, end in got.ranges)
        left = bytes(got.body)
        with pytest.raises(PeerGoneError, match="cannot be reached"):
            fetch(here, peer.address, "k0", Fetched(SIZE_BYTES))
        assert fetch(here, peers(tls).address, "k0", Fetched(SIZE_BYTES)).body == body()
        assert got.body == left


@pytest.mark.parametrize("tls", ["", "tcp,self", "posix,self"])
def test_a_peer_that_stalls_is_given_up_and_writes_nothing_when_it_goes_on(
    here: UcxTransport, tls: str
) -> None:
    with ucx_peer(SIZE_BYTES, tls=tls) as peer:
        got = CutShort(0, signal.SIGSTOP, peer)
        with pytest.raises(PeerSlowError) as raised:
            fetch(here, peer.address, "k0", got, idle_timeout_s=0.2)
        assert one_line(raised.value)
        left = bytes(got.body)
        peer.signal(signal.SIGCONT)
        eventually(lambda: at_rest(peer), "the end of the transfer at its sender")
        assert got.body == left
        assert fetch(here, peer.address, "k0", Fetched(SIZE_BYTES)).body == body()


@pytest.mark.parametrize("tls", [""])
def test_a_fetch_from_a_peer_that_stalls_can_be_stopped(here: UcxTransport, tls: str) -> None:
    with ucx_peer(SIZE_BYTES, tls=tls) as peer:
        got = CutShort(0, signal.SIGSTOP, peer)
        asked = iter(range(1000))
        with pytest.raises(FetchStoppedError):
            fetch(here, peer.address, "k0", got, stop=lambda: bool(got.ranges) and next(asked) > 30)
        left = bytes(got.body)
        peer.signal(signal.SIGCONT)
        eventually(lambda: at_rest(peer), "the end of the transfer at its sender")
        assert got.body == left


@WAYS
def test_a_receiver_that_is_killed_costs_its_sender_nothing_that_it_serves_with(
    here: UcxTransport, tls: str, peers: Callable[[str], UcxPeer]
) -> None:
    peer = peers(tls)
    assert die_while_fetching(peer.address, SIZE_BYTES, tls) == -signal.SIGKILL
    eventually(lambda: at_rest(peer), "the end of the transfer at its sender")
    assert peer.ask("state")["used_s"] < 0.05  # of 0.2 s; a thread that spins uses all of them
    assert fetch(here, peer.address, "k0", Fetched(SIZE_BYTES)).body == body()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("ucx")]


def test_peers_that_come_and_die_leave_no_threads_and_no_descriptors() -> None:
    with nothing_leaks():
        here = open_ucx(Listener("127.0.0.1"), chunk_bytes=CHUNK_BYTES)
        for at_chunk in (1, 6):
            with ucx_peer(SIZE_BYTES) as peer, pytest.raises(PeerGoneError):
                fetch(here, peer.address, "k0", CutShort(at_chunk, signal.SIGKILL, peer))
        here.close()
