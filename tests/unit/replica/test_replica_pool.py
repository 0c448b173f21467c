"""The pool's accounts under any order of events, and what it refuses."""

from contextlib import ExitStack
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraserve.errors import AlreadyExistsError, OverloadedError, StaleError
from loraserve.replica.pool import AdapterPool, PoolEntry, Residency
from placement.types import VersionId
from tests.support.engine_kit import adapter

SLOTS = 3
CAPACITY_BYTES = 100
NAMES = "abcde"
# One is too big beside two others, one too big for the pool.
SIZES_BYTES = {"a": 10, "b": 20, "c": 40, "d": 60, "e": 101}


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool beside a plain account of what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AdapterPool(max_adapters=SLOTS, capacity_bytes=CAPACITY_BYTES)
        self.states: dict[str, Residency] = {}
        self.pins: dict[str, tuple[str | None, ExitStack]] = {}
        self.drops: dict[str, PoolEntry] = {}
        self.ids = count()

    def users(self, name: str) -> set[str]:
        return {request for request, (used, _) in self.pins.items() if used == name}

    @rule(name=st.sampled_from(NAMES))
    def begin_load(self, name: str) -> None:
        files = adapter(name, size_bytes=SIZES_BYTES[name])
        used_bytes = sum(SIZES_BYTES[held] for held in self.states)
        if self.states.get(name) is Residency.RESIDENT:
            assert not self.pool.begin_load(files)
        elif name in self.states:
            with pytest.raises(AlreadyExistsError):
                self.pool.begin_load(files)
        elif len(self.states) == SLOTS or used_bytes + SIZES_BYTES[name] > CAPACITY_BYTES:
            with pytest.raises(OverloadedError):
                self.pool.begin_load(files)
        else:
            assert self.pool.begin_load(files)
            self.states[name] = Residency.LOADING

    @precondition(lambda self: Residency.LOADING in self.states.values())
    @rule(data=st.data(), good=st.booleans())
    def end_load(self, data: st.DataObject, good: bool) -> None:
        name = data.draw(st.sampled_from([n for n, s in self.states.items() if s is Residency.LOADING]))
        if good:
            self.pool.finish_load(VersionId(f"{name}@0"))
            self.states[name] = Residency.RESIDENT
        else:
            self.pool.abandon_load(VersionId(f"{name}@0"))
            del self.states[name]

    @rule(name=st.none() | st.sampled_from(NAMES))
    def pin(self, name: str | None) -> None:
        request = f"q{next(self.ids)}"
        stack = ExitStack()
        version = None if name is None else VersionId(f"{name}@0")
        if name is None or self.states.get(name) is Residency.RESIDENT:
            stack.enter_context(self.pool.pinned(version, request))
            self.pins[request] = (name, stack)
        else:
            with pytest.raises(StaleError):
                stack.enter_context(self.pool.pinned(version, request))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.pins)))
        self.pins.pop(request)[1].close()

    @rule(name=st.sampled_from(NAMES))
    def begin_drop(self, name: str) -> None:
        entry = self.pool.begin_drop(VersionId(f"{name}@0"))
        if self.states.get(name) in (None, Residency.LOADING):
            assert entry is None
        else:
            assert entry is not None
            self.states[name] = Residency.DRAINING
            self.drops[name] = entry

    @precondition(lambda self: self.drops)
    @rule(data=st.data())
    def finish_drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.drops)))
        if self.users(name):
            with pytest.raises(AssertionError, match="is dropped while"):
                self.pool.finish_drop(VersionId(f"{name}@0"))
        else:
            self.pool.finish_drop(VersionId(f"{name}@0"))
            del self.drops[name], self.states[name]

    @invariant()
    def accounts_are_even(self) -> None:
        self.pool.check_invariants(frozenset(self.pins))
        assert self.pool.used_bytes == sum(SIZES_BYTES[name] for name in self.states)
        assert {name: self.pool.residency(VersionId(f"{name}@0")) for name in NAMES} == {
            name: self.states.get(name) for name in NAMES
        }
        assert self.pool.resident() == tuple(
            sorted(f"{name}@0" for name, state in self.states.items() if state is Residency.RESIDENT)
        )
        for name, entry in self.drops.items():
            assert entry.unpinned.is_set() == (not self.users(name))

    def teardown(self) -> None:
        for _, stack in self.pins.values():
            stack.close()
        self.pool.check_invariants(frozenset())
        for name, state in self.states.items():
            version = VersionId(f"{name}@0")
            if state is Residency.LOADING:
                self.pool.abandon_load(version)
                continue
            entry = self.pool.begin_drop(version)
            assert entry is not None
            assert entry.unpinned.is_set()
            self.pool.finish_drop(version)
        assert self.pool.used_bytes == 0
        assert self.pool.resident() == ()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def pool_with(*names: str) -> AdapterPool:
    pool = AdapterPool(max_adapters=2, capacity_bytes=2500)
    for name in names:
        assert pool.begin_load(adapter(name))
        pool.finish_load(VersionId(f"{name}@0"))
    return pool


def test_each_refusal_says_why() -> None:
    pool = pool_with("a")
    with pytest.raises(OverloadedError, match="big@0: needs 2000 bytes, the pool has 1500 left"):
        pool.begin_load(adapter("big", size_bytes=2000))
    pool.begin_load(adapter("b"))
    with pytest.raises(AlreadyExistsError, match="b@0 is loading; try again later"):
        pool.begin_load(adapter("b"))
    with pytest.raises(OverloadedError, match="c@0: the replica holds 2 adapters already, its most"):
        pool.begin_load(adapter("c"))
    with (
        pytest.raises(StaleError, match="b@0 is loading on this replica"),
        pool.pinned(VersionId("b@0"), "q"),
    ):
        pass
    with (
        pytest.raises(StaleError, match="c@0 is not here on this replica"),
        pool.pinned(VersionId("c@0"), "q"),
    ):
        pass
    with pool.pinned(VersionId("a@0"), "q"):
        pool.begin_drop(VersionId("a@0"))
        with pytest.raises(AlreadyExistsError, match="a@0 is draining"):
            pool.begin_load(adapter("a"))
        with pytest.raises(StaleError, match="a@0 is draining"), pool.pinned(VersionId("a@0"), "p"):
            pass
        with pytest.raises(AssertionError, match=r"a@0 is dropped while \['q'\] use it"):
            pool.finish_drop(VersionId("a@0"))


def test_the_checker_sees_what_is_wrong() -> None:
    pool = pool_with("a", "b")
    with pool.pinned(VersionId("a@0"), "q"):
        with pytest.raises(AssertionError, match=r"a@0 is pinned by \['q'\]"):
            pool.check_invariants(frozenset())
        pool.check_invariants(frozenset({"q"}))
    pool.max_adapters = 1
    with pytest.raises(AssertionError, match="2 adapters in a pool of 1"):
        pool.check_invariants(frozenset())
    pool.max_adapters, pool.capacity_bytes = 2, 1999
    with pytest.raises(AssertionError, match="2000 bytes in a pool of 1999"):
        pool.check_invariants(frozenset())


def test_a_pin_ends_with_an_error_too() -> None:
    pool = pool_with("a")
    with pytest.raises(ZeroDivisionError), pool.pinned(VersionId("a@0"), "q"):
        raise ZeroDivisionError
    pool.check_invariants(frozenset())


def test_what_is_not_here_is_dropped_without_a_word() -> None:
    pool = pool_with()
    assert pool.begin_drop(VersionId("a@0")) is None
    pool.finish_drop(VersionId("a@0"))
    pool.abandon_load(VersionId("a@0"))
