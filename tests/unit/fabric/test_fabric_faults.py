"""Whatever a peer does, what is given out is the adapter, from elsewhere, or one clear line says why not."""

import asyncio
import logging
import random
from dataclasses import replace

import pytest

from loraserve.adapters.body_hashes import BodyHashes, root_of_body
from loraserve.adapters.segment import SegmentHead
from loraserve.adapters.segment_head import hashed
from loraserve.clock import ManualClock
from loraserve.errors import AdapterRejectedError, LoraServeError, OverloadedError
from loraserve.fabric.wanted import FetchFailedError, Wanted
from loraserve.transport.base import TransportError
from loraserve.transport.memory import FaultKind
from placement.fabric.breaker import BreakerRules
from tests.support.adapter_maker import one_line
from tests.support.fabric_kit import WAIT_S, Hooks, Library, Node, Town, from_peers

MIB = 1024**2


async def taken(node: Node, wanted: Wanted) -> tuple[str, str]:
    """Acquire it, check it, and say where it came from."""
    acquired = await node.fabric.acquire(wanted)
    body = acquired.segment.region().body
    head = acquired.segment.decoded
    assert root_of_body(body, head.chunk_bytes) == head.body_sha256
    assert acquired.segment.decoded.digest == wanted.digest
    node.check(idle=True)
    return acquired.source, acquired.peer


async def refused(node: Node, wanted: Wanted, kind: type[LoraServeError] = FetchFailedError) -> str:
    """Why it cannot be acquired: one line of bounded length, and nothing is left."""
    with pytest.raises(kind) as error:
        await node.fabric.acquire(wanted)
    node.check(idle=True)
    assert node.counts.in_flight_bytes == node.counts.held_bytes == 0
    line = one_line(error.value)
    assert wanted.version_id in line
    assert len(line) < 2000
    return line


@pytest.mark.parametrize(
    ("kind", "at_byte", "counted"),
    [
        (FaultKind.REFUSE, 0, "unreachable"),
        (FaultKind.NOT_PUBLISHED, 0, "not published"),
        (FaultKind.WRONG_HEAD, 0, "corrupt"),
        (FaultKind.DIE, 0, "gone"),
        (FaultKind.DIE, 1, "gone"),
        (FaultKind.DIE, MIB + 17, "gone"),
        (FaultKind.DIE, -1, "gone"),
        (FaultKind.DIE, None, "gone"),
        (FaultKind.SHORT, MIB, "corrupt"),
        (FaultKind.SHORT, -1, "corrupt"),
        (FaultKind.FLIP, 0, "corrupt"),
        (FaultKind.FLIP, MIB + 17, "corrupt"),
        (FaultKind.FLIP, -1, "corrupt"),
        (FaultKind.STALL, 0, "slow"),
        (FaultKind.STALL, MIB + 17, "slow"),
    ],
)
async def test_a_peer_that_fails_is_replaced_by_another_then_by_the_origin(
    town: Town,
    library: Library,
    caplog: pytest.LogCaptureFixture,
    kind: FaultKind,
    at_byte: int | None,
    counted: str,
) -> None:
    wanted = library.large()
    bad, worse, good = [await town.holder(name, wanted) for name in ("bad", "worse", "good")]
    body_bytes = (await good.fabric.acquire(wanted)).segment.body_bytes
    # -1: the last byte; None: all bytes are there.
    place = body_bytes if at_byte is None else at_byte % body_bytes
    for one in (bad, worse):
        one.inject(kind, place)
    node, lone, last = (town(name, idle_timeout_s=0.05) for name in ("node", "lone", "last"))
    with caplog.at_level(logging.WARNING):
        assert await taken(node, from_peers(wanted, bad, worse, good)) == ("peer", "good")
    assert node.counts.failures == {counted: 2}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert all(counted in line and wanted.version_id in line for line in lines)
    assert await taken(lone, from_peers(wanted, bad, origin=True)) == ("origin", "")
    assert "bad over memory: " + counted in await refused(last, from_peers(wanted, bad))


async def test_a_wrong_hash_table_is_refused_before_anything_is_allocated(
    town: Town, library: Library
) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")

    def other_table(raw: bytes, body_bytes: int) -> tuple[bytes, int]:
        head = SegmentHead.decode(raw)
        zeros = BodyHashes(fast=bytes(len(head.chunk_hashes)), sha256=bytes(len(head.chunk_sha256s)))
        return hashed(head, digest=head.digest, hashes=zeros).encode(), body_bytes

    node.hooks.change_head = other_table
    assert "its head hashes to" in await refused(node, from_peers(wanted, holder))
    assert [what for what, _ in node.transports[0].asked] == ["head"]


async def test_a_body_of_another_length_is_refused_before_anything_is_allocated(
    town: Town, library: Library
) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    node.hooks.change_head = lambda raw, body_bytes: (raw, body_bytes + 1)
    assert "its body has" in await refused(node, from_peers(wanted, holder))
    assert [what for what, _ in node.transports[0].asked] == ["head"]


async def test_a_transport_that_skips_bytes_or_tells_more_than_came_gives_nothing(
    town: Town, library: Library
) -> None:
    wanted = library.large()
    holder = await town.holder("holder", wanted)
    for told, says in (
        (lambda begin, end: (begin, begin), "never came"),
        (lambda begin, end: (begin, end + 9 * MIB), "it sent bytes"),
        (lambda begin, end: (0, end), "it sent part of chunk 0 twice"),
    ):
        node = town(says)
        node.hooks.on_piece = told
        assert says in await refused(node, from_peers(wanted, holder))
        assert node.counts.failures["corrupt"] == 1


@pytest.mark.parametrize("error", [RuntimeError("a\nbug"), OSError(5, "I/O error"), TransportError("broken")])
async def test_a_transport_that_breaks_is_replaced_by_the_next(
    town: Town, library: Library, error: Exception
) -> None:
    wanted = library.large()
    holder = await town.holder("holder", wanted, schemes=("memory", "second"))
    node = town("node", schemes=("memory", "second"))

    def fail(key: str) -> None:
        raise error

    for hooks in (Hooks(before_head=fail), Hooks(after_body=fail)):
        node.transports[0].hooks = hooks
        acquired = await node.fabric.acquire(from_peers(wanted, holder))
        assert acquired.scheme == "second"
        node.fabric.release(wanted.version_id)
        assert node.fabric.forget(wanted.version_id)
    assert node.counts.failures == {"broken": 2}
    assert node.counts.loads == {"second": 2}


async def test_what_is_right_and_cannot_be_used_here_is_not_tried_elsewhere(
    town: Town, library: Library
) -> None:
    wanted = library()
    holder, node = await town.holder("holder", wanted), town("node")
    low = replace(from_peers(wanted, holder, origin=True), max_lora_rank=2)
    assert "rank 4 is above 2" in await refused(node, low, AdapterRejectedError)
    assert "rank 4 is above" in await refused(node, replace(low, peers=()), AdapterRejectedError)
    assert node.counts.failures["rejected"] == 2


async def test_an_origin_that_is_not_what_was_told_is_refused(town: Town, library: Library) -> None:
    node, one, other = town("node"), library("a"), library("a", seed=5)
    assert "no peer and no origin" in await refused(node, replace(one, directory=None))
    missing = replace(one, directory=(one.directory or other.directory) / "nowhere")  # type: ignore[operator]
    await refused(node, missing, LoraServeError)
    assert "sha256" in await refused(node, replace(one, directory=other.directory), AdapterRejectedError)
    told = replace(one, head_sha256="0" * 64)
    assert "the origin: failed: its head hashes to" in await refused(node, told)


async def test_no_memory_is_no_peers_fault(
    town: Town, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = library()
    holder, node = await town.holder("holder", wanted), town("node")

    def no_memory(head: bytes) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("loraserve.fabric.peer_fetch.SegmentWriter", no_memory)
        assert "no memory for" in await refused(node, from_peers(wanted, holder), OverloadedError)
    assert await taken(node, from_peers(wanted, holder)) == ("peer", "holder")


async def test_the_final_error_names_what_was_tried_and_stays_short(town: Town, library: Library) -> None:
    wanted = library()
    holders = [await town.holder(f"holder{number}", wanted) for number in range(12)]
    for one in holders:
        one.inject(FaultKind.REFUSE)
    node = town("node", max_attempts=10)
    line = await refused(node, from_peers(wanted, *holders))
    assert "2 more; replica holder2 over memory: unreachable" in line
    assert "holder9" in line
    assert "holder10" not in line


async def test_an_address_that_keeps_failing_is_left_alone_and_tried_again_later(
    town: Town, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    versions = [library(f"n{number}") for number in range(5)]
    bad = await town.holder("bad", *versions)
    fault = bad.inject(FaultKind.REFUSE)
    node = town("node", clock=clock, breaker=BreakerRules(failures=2, first_s=1, max_s=4))
    for wanted in versions[:2]:
        await taken(node, from_peers(wanted, bad, origin=True))
    assert node.counts.breakers == {"bad/memory": "open"}
    assert "replica bad over memory keeps failing: not tried for 1 s" in caplog.text
    assert await taken(node, from_peers(versions[2], bad, origin=True)) == ("origin", "")
    assert node.counts.failures == {"unreachable": 2, "refused": 1}
    clock.advance(1)
    bad.memory().heal()
    assert fault.release.is_set()
    assert await taken(node, from_peers(versions[3], bad, origin=True)) == ("peer", "bad")
    assert node.counts.breakers == {}
    bad.inject(FaultKind.REFUSE)
    assert await taken(node, from_peers(versions[4], bad, origin=True)) == ("origin", "")
    assert node.counts.failures == {"unreachable": 3, "refused": 1}


async def test_a_scheme_that_fails_where_another_does_not_is_left_alone(town: Town, library: Library) -> None:
    clock = ManualClock()
    versions = [library(f"n{number}") for number in range(4)]
    both = ("ucx", "tcp")
    holders = [await town.holder(f"holder{number}", *versions, schemes=both) for number in range(4)]
    node = town("node", clock=clock, schemes=both, breaker=BreakerRules(failures=3))
    for one in holders:
        one.inject(FaultKind.REFUSE, scheme=0)
    for number, wanted in enumerate(versions[:3]):
        # Another holder each time: no address fails often.
        acquired = await node.fabric.acquire(from_peers(wanted, holders[number]))
        assert acquired.scheme == "tcp"
    assert node.counts.breakers == {"ucx": "open"}
    assert (await node.fabric.acquire(from_peers(versions[3], holders[3]))).scheme == "tcp"
    assert ("head", versions[3].version_id) not in node.transports[0].asked


async def test_a_missing_library_is_asked_once(town: Town, library: Library) -> None:
    versions = [library(f"n{number}") for number in range(2)]
    holder = await town.holder("holder", *versions, schemes=("ucx", "tcp"))
    node = town("node", schemes=("ucx", "tcp"))

    def missing(key: str) -> None:
        raise ImportError("no module named ucxx")

    node.hooks.before_head = missing
    for wanted in versions:
        assert (await node.fabric.acquire(from_peers(wanted, holder))).scheme == "tcp"
    assert node.counts.failures == {"broken": 1, "refused": 1}


async def test_a_holder_that_dies_with_many_fetches_running_costs_none_of_them(
    town: Town, library: Library
) -> None:
    versions = [library.large(f"n{number}") for number in range(4)]
    dying, other = [await town.holder(name, *versions) for name in ("dying", "other")]
    node = town("node")
    stall = dying.inject(FaultKind.STALL, MIB)
    wanted = [from_peers(one, dying, other) for one in versions]
    running = [asyncio.create_task(node.fabric.acquire(one)) for one in wanted]
    assert await asyncio.to_thread(stall.reached.wait, WAIT_S)
    dying.die()
    assert [one.peer for one in await asyncio.gather(*running)] == ["other"] * 4
    assert "gone" in node.counts.failures
    assert sum(node.counts.failures.values()) == 4, "each has failed once, or was kept from trying"


async def test_random_flips_never_get_through(town: Town, library: Library) -> None:
    wanted, rng = library.large(), random.Random(8)
    holder = await town.holder("holder", wanted)
    body_bytes = (await holder.fabric.acquire(wanted)).segment.body_bytes
    node = town("node", max_attempts=1)
    for _ in range(20):
        holder.memory().heal()
        holder.inject(FaultKind.FLIP, rng.randrange(body_bytes))
        await refused(node, from_peers(wanted, holder))
