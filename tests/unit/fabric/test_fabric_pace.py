"""Fetches keep a pace in the threads in which they work, while their replica has better to do."""

import threading

import pytest

from tests.support.fabric_kit import Library, Town, from_peers

MIB = 1024**2


async def test_a_fetch_asks_in_its_own_threads_whether_requests_run(town: Town, library: Library) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    asked: set[str] = set()

    def is_busy() -> bool:
        asked.add(threading.current_thread().name.rpartition("_")[0])
        return False

    node.fabric.give_way_while(is_busy)
    await node.fabric.acquire(from_peers(wanted, holder))
    assert "fabric-fetch" in asked
    assert asked <= {"fabric-fetch", "fabric-verify"}


async def test_a_fetch_of_a_busy_replica_comes_to_its_end(town: Town, library: Library) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node", busy_share=0.5)
    node.fabric.give_way_while(lambda: True)
    assert (await node.fabric.acquire(from_peers(wanted, holder))).source == "peer"


async def test_so_does_one_that_reads_the_origin(town: Town, library: Library) -> None:
    asked: set[str] = set()

    def is_busy() -> bool:
        asked.add(threading.current_thread().name.rpartition("_")[0])
        return False

    node = town("node")
    node.fabric.give_way_while(is_busy)
    assert (await node.fabric.acquire(library.large())).source == "origin"
    assert asked == {"fabric-fetch"}


async def test_where_requests_may_run_bodies_come_in_short_pieces(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = town("node"), town("other")
    monkeypatch.setattr(node.transports[0], "piece_bytes", 8 * MIB)
    monkeypatch.setattr(other.transports[0], "piece_bytes", 4096)
    for one in (node, other):
        one.fabric.give_way_while(lambda: False)
    assert [one.transports[0].piece_bytes for one in (node, other)] == [MIB, 4096]
    assert node.transports[0].pace is not other.transports[0].pace is not None
