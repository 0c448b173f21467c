"""Whose fault a failed attempt is: of the peer, of the way to it, or of what was asked for."""

from collections.abc import Callable
from typing import Any

import pytest

from loraserve.adapters.body_hashes import root_of_body
from loraserve.clock import ManualClock
from loraserve.fabric.peer_fetch import SLOW_IDLES
from loraserve.fabric.wanted import FetchFailedError
from loraserve.transport.base import (
    Buffer,
    FetchStoppedError,
    NotPublishedError,
    PeerBusyError,
    PeerFailedError,
    TransportError,
)
from placement.fabric.breaker import BreakerRules
from tests.support.fabric_kit import Library, Town, from_peers, segments_mapped, until

RULES = BreakerRules(failures=2, first_s=1, max_s=4)


@pytest.mark.parametrize("error", [PeerBusyError("enough connections"), PeerFailedError("it failed")])
async def test_a_peer_that_says_it_cannot_is_left_alone_and_nobody_else(
    town: Town, library: Library, error: TransportError
) -> None:
    versions = [library(f"n{number}") for number in range(3)]
    bad, good = await town.holder("bad", *versions), await town.holder("good", *versions)
    node = town("node", clock=ManualClock(), breaker=RULES)

    def refuse(key: str) -> None:
        if len([what for what, _ in node.transports[0].asked if what == "head"]) % 2:
            raise error

    node.hooks.before_head = refuse
    for wanted in versions[:2]:
        assert (await node.fabric.acquire(from_peers(wanted, bad, good))).peer == "good"
    assert node.counts.breakers == {"bad/memory": "open"}
    node.hooks.before_head = lambda key: None
    assert (await node.fabric.acquire(from_peers(versions[2], bad, good))).peer == "good"
    assert node.counts.failures == {"unreachable": 2, "refused": 1}


async def test_what_a_peer_cannot_make_says_nothing_of_the_rest_that_it_has(
    town: Town, library: Library
) -> None:
    good = library("good")
    holder = await town.holder("holder", good)
    node = town("node", clock=ManualClock(), breaker=RULES)

    def refuse(key: str) -> None:
        if key != good.version_id:
            raise NotPublishedError(f"{key} could not be made: its file is damaged")

    node.hooks.before_head = refuse
    for number in range(3):
        with pytest.raises(FetchFailedError, match="its file is damaged"):
            await node.fabric.acquire(from_peers(library(f"damaged{number}"), holder))
    assert node.counts.breakers == {}
    assert (await node.fabric.acquire(from_peers(good, holder))).peer == "holder"


async def test_a_peer_that_drips_is_as_good_as_silent(town: Town, library: Library) -> None:
    """The transport hears something all the time, and yet no piece is ever whole."""
    wanted, clock = library.large(), ManualClock()
    slow, good = await town.holder("slow", wanted), await town.holder("good", wanted)
    node = town("node", clock=clock, idle_timeout_s=5.0)
    asked: list[bool] = []

    def drip(key: str, stop: Callable[[], bool]) -> None:
        if asked:
            return
        for _ in range(SLOW_IDLES):
            clock.advance(5.0)
            asked.append(stop())
        clock.advance(0.1)
        asked.append(stop())
        raise FetchStoppedError("stopped")

    node.hooks.before_body = drip
    acquired = await node.fabric.acquire(from_peers(wanted, slow, good))
    assert asked == [False] * SLOW_IDLES + [True]
    assert acquired.peer == "good"
    assert node.counts.failures == {"slow": 1}


async def test_a_peer_may_take_as_long_as_it_likes_while_pieces_come(town: Town, library: Library) -> None:
    wanted, clock = library.large(), ManualClock()
    holder, node = await town.holder("holder", wanted), town("node", clock=clock, idle_timeout_s=5.0)
    pieces: list[int] = []

    def on_piece(begin: int, end: int) -> tuple[int, int]:
        clock.advance(5.0 * SLOW_IDLES)
        pieces.append(begin)
        return begin, end

    node.hooks.on_piece = on_piece
    acquired = await node.fabric.acquire(from_peers(wanted, holder))
    assert (acquired.source, len(pieces) > 2) == ("peer", True)


async def test_a_transport_that_could_still_write_gives_nothing(town: Town, library: Library) -> None:
    """What is hashed must be what is sealed: nobody may have the body in between."""
    wanted = library.large()
    holder = await town.holder("holder", wanted, schemes=("memory", "second"))
    node = town("node", schemes=("memory", "second"))
    inner, views = node.transports[0].inner, []
    fetch = inner.fetch

    def keep_a_view(address: bytes, key: str, into: Buffer, **options: Any) -> None:
        fetch(address, key, into, **options)
        views.append(memoryview(into))

    node.transports[0].inner.fetch = keep_a_view  # type: ignore[method-assign]
    acquired = await node.fabric.acquire(from_peers(wanted, holder))
    assert acquired.scheme == "second"
    assert node.counts.failures == {"broken": 1}
    views.pop()[0] = 0
    head = acquired.segment.decoded
    assert root_of_body(acquired.segment.region().body, head.chunk_bytes) == head.body_sha256
    await until(lambda: segments_mapped() == 2)
