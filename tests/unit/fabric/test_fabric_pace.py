"""Fetches keep a pace in the threads in which they work, while their replica has better to do."""

import threading

from tests.support.fabric_kit import Library, Town, from_peers


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
