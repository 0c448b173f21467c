"""Over real sockets from real processes: killed or stopped at any stage, the adapter comes from elsewhere."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import pytest

from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import FabricOptions, Wanted
from loraserve.transport.registry import open_transports
from tests.support.fabric_kit import PLENTY, Hooks, Library, StagedTransport
from tests.support.fabric_process import OtherProcess, other_process
from tests.support.segments import own_segments


@pytest.fixture(scope="module")
def wanted(library: Library) -> Wanted:
    """32 MiB: more than sockets keep for a process that is gone."""
    return library("large", width=2**20)


@pytest.fixture
def other(wanted: Wanted) -> Iterator[OtherProcess]:
    with other_process(wanted) as other:
        yield other


@pytest.fixture
async def here() -> AsyncIterator[tuple[Fabric, Hooks]]:
    """A fabric of this process, and the hooks of its transport."""
    (inner,) = open_transports(["tcp"], host="127.0.0.1").transports
    transport = StagedTransport(inner)
    fabric = Fabric((transport,), capacity_bytes=PLENTY, options=FabricOptions(idle_timeout_s=1.0))
    yield fabric, transport.hooks
    await fabric.close()
    fabric.check_invariants(idle=True)
    counts = fabric.counts()
    assert counts.held_bytes == counts.cached_bytes == counts.leaving_bytes == 0
    assert own_segments() == 0


def act_at(hooks: Hooks, where: str, act: Callable[[], None]) -> None:
    """Do this at a stage of the fetch."""

    def in_body(begin: int, end: int) -> tuple[int, int]:
        act()
        return begin, end

    match where:
        case "before the head":
            hooks.before_head = lambda key: act()
        case "before the body":
            hooks.before_body = lambda key, stop: act()
        case _:
            hooks.on_piece = in_body


async def test_it_comes_from_another_process(
    wanted: Wanted, other: OtherProcess, here: tuple[Fabric, Hooks]
) -> None:
    fabric, _ = here
    acquired = await fabric.acquire(replace(wanted, peers=(other.peer,), directory=None))
    assert (acquired.source, acquired.scheme) == ("peer", "tcp")
    assert acquired.segment.decoded.digest == wanted.digest


@pytest.mark.parametrize("where", ["before the head", "before the body", "in the body"])
async def test_a_process_that_is_killed_is_replaced(
    wanted: Wanted, other: OtherProcess, here: tuple[Fabric, Hooks], where: str
) -> None:
    fabric, hooks = here

    def kill() -> None:
        other.process.kill()
        other.process.wait()

    act_at(hooks, where, kill)
    acquired = await fabric.acquire(replace(wanted, peers=(other.peer,)))
    assert acquired.source == "origin"
    assert set(fabric.counts().failures) <= {"unreachable", "gone"}
    assert sum(fabric.counts().failures.values()) == 1


async def test_a_process_that_is_stopped_is_too_slow(
    wanted: Wanted, other: OtherProcess, here: tuple[Fabric, Hooks]
) -> None:
    fabric, hooks = here
    act_at(hooks, "in the body", lambda: os.kill(other.process.pid, signal.SIGSTOP))
    acquired = await fabric.acquire(replace(wanted, peers=(other.peer,)))
    assert acquired.source == "origin"
    assert fabric.counts().failures == {"slow": 1}
