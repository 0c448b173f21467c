"""Random acquisitions, prefetches, releases, cancellations and faults: the accounts are always right."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from loraserve.adapters.segment import AdapterSegment, build_segment
from loraserve.clock import ManualClock
from loraserve.errors import LoraServeError, OverloadedError
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import Acquired, FabricOptions, FetchFailedError, PeerAddress, Wanted
from loraserve.transport.base import Region
from loraserve.transport.memory import Fault, FaultKind, MemoryNet
from tests.support.fabric_kit import WAIT_S, Library, segments_mapped
from tests.support.segments import own_segments

T = TypeVar("T")
SCHEMES = ("fast", "sure")
numbers = st.integers(0, 4)


class Shelf:
    """Five versions of one size as peers serve them, built once for all examples."""

    def __init__(self, library: Library) -> None:
        self.versions = [library(f"n{number}") for number in range(5)]
        self.segments = [self._built(one) for one in self.versions]
        self.bodies = [bytes(one.region().body) for one in self.segments]
        self.memory = (own_segments(), segments_mapped())

    @staticmethod
    def _built(wanted: Wanted) -> AdapterSegment:
        assert wanted.directory is not None
        return build_segment(wanted.directory, name=wanted.version_id, digest=wanted.digest, max_lora_rank=64)

    def close(self) -> None:
        for one in self.segments:
            one.close()


class FabricMachine(RuleBasedStateMachine):
    """One fabric, two peers with two schemes each, and an origin for those who may ask it."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self.shelf = shelf
        self.size_bytes = shelf.versions[0].size_bytes
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.nets = [MemoryNet(scheme=scheme, piece_bytes=300) for scheme in SCHEMES]
        self.ends = [[net.open(name) for net in self.nets] for name in ("left", "right")]
        self._publish()
        self.fabric = self.run(self._open())
        self.tasks: list[tuple[int, asyncio.Task[Acquired | None]]] = []
        self.held: Counter[int] = Counter()

    def _publish(self) -> None:
        for end in (end for ends in self.ends for end in ends):
            for segment in self.shelf.segments:
                head, body, fd, offset = segment.region()
                region = Region(head=head, body=body, size_bytes=len(body), fd=fd, fd_offset=offset)
                end.publish(segment.decoded.name, region)

    async def _open(self) -> Fabric:
        # Room for three of the five, and a little for what a fetch keeps more than it needs.
        return Fabric(
            [net.open("node") for net in self.nets],
            capacity_bytes=3 * self.size_bytes + 10_000,
            options=FabricOptions(max_fetches=2, inflight_bytes=2 * self.size_bytes, idle_timeout_s=WAIT_S),
            clock=self.clock,
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def wanted(self, number: int, *, origin: bool) -> Wanted:
        peers = tuple(
            PeerAddress(replica_id=name, addresses=tuple((end.scheme, end.address) for end in ends))
            for name, ends in zip(("left", "right"), self.ends, strict=True)
        )
        one = self.shelf.versions[number]
        return replace(one, peers=peers, directory=one.directory if origin else None)

    def start(self, number: int, coroutine: Coroutine[Any, Any, Acquired | None]) -> None:
        self.tasks.append((number, self.loop.create_task(coroutine)))
        self.breathe()

    def breathe(self, turns: int = 3) -> None:
        """Give the loop a few turns, then see who is done."""
        for _ in range(turns):
            self.run(asyncio.sleep(0))
        running = []
        for number, task in self.tasks:
            if task.done():
                self.take(number, task)
            else:
                running.append((number, task))
        self.tasks = running

    def take(self, number: int, task: "asyncio.Task[Acquired | None]") -> None:
        """Account for a call that has ended."""
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            assert isinstance(error, OverloadedError | FetchFailedError), repr(error)
            assert str(error).isprintable()
            return
        acquired = task.result()
        if acquired is not None:
            self.held[number] += 1
            assert acquired.segment.region().body == self.shelf.bodies[number], "wrong bytes were given out"

    # -- what may happen -------------------------------------------------------------------------

    @rule(number=numbers, origin=st.booleans(), turns=st.integers(1, 20))
    def acquire(self, number: int, origin: bool, turns: int) -> None:
        self.start(number, self.fabric.acquire(self.wanted(number, origin=origin)))
        self.breathe(turns)

    @rule(number=numbers, origin=st.booleans())
    def prefetch(self, number: int, origin: bool) -> None:
        self.start(number, self.fabric.prefetch(self.wanted(number, origin=origin)))

    # No preconditions: who is done when is the threads' to decide, and examples must not depend on it.

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.tasks:
            self.tasks[which % len(self.tasks)][1].cancel()
            self.breathe()

    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        here = sorted(+self.held)
        if here:
            number = here[which % len(here)]
            self.held[number] -= 1
            self.fabric.release(self.shelf.versions[number].version_id)
            self.breathe()

    @rule(
        peer=st.integers(0, 1),
        scheme=st.integers(0, 1),
        kind=st.sampled_from(tuple(FaultKind)),
        place=st.integers(0, 600),
    )
    def go_wrong(self, peer: int, scheme: int, kind: FaultKind, place: int) -> None:
        self.ends[peer][scheme].inject(Fault(kind=kind, at_byte=place, times=2))

    @rule(seconds=st.integers(0, 100))
    def heal(self, seconds: int) -> None:
        for end in (end for ends in self.ends for end in ends):
            end.heal()
        self.clock.advance(seconds)
        self.breathe()

    @rule(number=numbers, is_last=st.booleans())
    def mark_last(self, number: int, is_last: bool) -> None:
        self.fabric.mark_last(self.shelf.versions[number].version_id, is_last)

    @rule(number=numbers, tokens_per_s=st.floats(0, 1000))
    def expect(self, number: int, tokens_per_s: float) -> None:
        self.fabric.set_demand({self.shelf.versions[number].version_id: tokens_per_s})

    @rule(number=numbers)
    def forget(self, number: int) -> None:
        version = self.shelf.versions[number].version_id
        forgotten = self.fabric.forget(version)
        assert not (forgotten and self.held[number])
        assert not (forgotten and version in self.fabric.published())

    @rule()
    def settle(self) -> None:
        """All that runs ends; then the accounts are exact."""
        self.heal(0)
        if self.tasks:
            self.run(asyncio.wait([task for _, task in self.tasks]))
        self.breathe()
        self.run(self._idle())
        self.fabric.check_invariants(idle=True)
        assert self.fabric.counts().held_bytes == self.size_bytes * len(+self.held)

    async def _idle(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not self.fabric.is_idle or self.fabric.counts().leaving_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def accounts_are_right(self) -> None:
        self.fabric.check_invariants()
        published = self.fabric.published()
        for number in +self.held:
            assert self.shelf.versions[number].version_id in published, "an acquired version is gone"
        assert self.fabric.counts().held_bytes >= self.size_bytes * len(+self.held)

    def teardown(self) -> None:
        self.run(self.fabric.close())
        for number, task in self.tasks:
            self.run(asyncio.wait([task]))
            # What was acquired as the fabric closed is closed too.
            assert task.cancelled() or isinstance(task.exception(), LoraServeError | None), number
        self.fabric.check_invariants(idle=True)
        counts = self.fabric.counts()
        assert counts.held_bytes == counts.cached_bytes == counts.leaving_bytes == 0
        self.loop.close()
        self.tasks.clear()
        for end in (end for ends in self.ends for end in ends):
            end.close()
        assert (own_segments(), segments_mapped()) == self.shelf.memory


@pytest.fixture
def shelf(library: Library) -> Iterator[Shelf]:
    shelf = Shelf(library)
    yield shelf
    shelf.close()


def test_whatever_happens_nothing_wrong_is_given_out_and_nothing_leaks(shelf: Shelf) -> None:
    class OnShelf(FabricMachine):
        def __init__(self) -> None:
            super().__init__(shelf)

    run_state_machine_as_test(OnShelf, settings=settings(max_examples=60, stateful_step_count=40))
