"""The slot table: scenarios with their exact commands, and random events beside a model of the engine."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from placement.slots import messages
from placement.slots.machine import SlotPhase, SlotTable
from placement.types import VersionId

A, B, C, D, E = (VersionId(f"{name}@0") for name in "abcde")
VERSIONS = (A, B, C, D, E, VersionId("f@0"))


class Shell:
    """Tells a table what happened in short and collects its commands in short."""

    def __init__(self, num_slots: int) -> None:
        self.table = SlotTable(num_slots=num_slots)

    def tell(self, event: messages.Event) -> list[str]:
        said = [_short(command) for command in self.table.handle(event)]
        self.table.check_invariants()
        return said

    def want(self, version: VersionId, request: str) -> list[str]:
        return self.tell(messages.Wanted(version_id=version, request_id=request))

    def end(self, version: VersionId, request: str) -> list[str]:
        return self.tell(messages.Ended(version_id=version, request_id=request))

    def activated(self, version: VersionId) -> list[str]:
        return self.tell(messages.Activated(version_id=version))

    def deactivated(self, version: VersionId) -> list[str]:
        return self.tell(messages.Deactivated(version_id=version))

    def run(self, version: VersionId, *requests: str) -> None:
        """These requests of a version that gets a slot at once are admitted."""
        for request in requests:
            self.want(version, request)
        if self.table.phase(version) is SlotPhase.ACTIVATING:
            self.activated(version)


def _short(command: messages.Command) -> str:
    match command:
        case messages.Activate(version_id=version):
            return f"+{version[0]}"
        case messages.Deactivate(version_id=version):
            return f"-{version[0]}"
        case messages.Admit(request_id=request):
            return request
        case messages.Refuse(request_id=request, reason=reason):
            return f"{request}: {reason}"


def test_a_request_is_admitted_when_its_version_is_active() -> None:
    shell = Shell(2)
    assert shell.want(A, "a1") == ["+a"]
    assert shell.want(A, "a2") == []
    assert shell.activated(A) == ["a1", "a2"]
    assert shell.want(A, "a3") == ["a3"]


def test_the_idle_version_used_longest_ago_gives_its_slot_up() -> None:
    shell = Shell(2)
    shell.run(A, "a1")
    shell.run(B, "b1")
    shell.end(B, "b1")
    shell.end(A, "a1")
    assert shell.want(C, "c1") == ["-b"]
    assert shell.deactivated(B) == ["+c"]
    assert shell.activated(C) == ["c1"]


def test_without_an_idle_one_the_version_with_the_fewest_requests_closes() -> None:
    shell = Shell(2)
    shell.run(A, "a1", "a2")
    shell.run(B, "b1")
    assert shell.want(C, "c1") == []
    assert shell.table.phase(B) is SlotPhase.CLOSING
    assert shell.want(B, "b2") == [], "new requests of a closing version wait behind"
    assert shell.want(A, "a3") == ["a3"]
    assert shell.end(B, "b1") == ["-b"]
    assert shell.deactivated(B) == ["+c"]
    assert shell.activated(C) == ["c1"]
    assert shell.want(A, "a4") == []
    assert [shell.table.phase(one) for one in (A, B, C)] == [SlotPhase.CLOSING, None, SlotPhase.ACTIVE]
    assert shell.end(C, "c1") == ["-c", "a4"], "nobody needs the other slot now"
    assert shell.deactivated(C) == ["+b"]
    assert shell.activated(B) == ["b2"]


def test_as_many_versions_close_as_lack_a_slot_and_they_are_served_in_their_order() -> None:
    shell = Shell(2)
    shell.run(A, "a1")
    shell.run(B, "b1")
    for version in (C, D, E):
        assert shell.want(version, f"{version[0]}1") == []
    assert shell.end(B, "b1") == ["-b"]
    assert shell.end(A, "a1") == ["-a"]
    assert shell.deactivated(A) == ["+c"]
    assert shell.deactivated(B) == ["+d"]
    assert shell.activated(D) == ["d1"]
    assert shell.table.phase(D) is SlotPhase.CLOSING, "the third one still waits"
    assert shell.table.snapshot().waiting == {C: 1, E: 1}


def test_a_mark_is_taken_back_when_those_it_was_made_for_have_gone() -> None:
    shell = Shell(1)
    shell.run(A, "a1")
    shell.want(B, "b1")
    assert shell.want(A, "a2") == []
    assert shell.end(B, "b1") == ["a2"]
    assert shell.table.phase(A) is SlotPhase.ACTIVE


def test_who_waits_keeps_its_victim_while_others_come_and_go() -> None:
    shell = Shell(2)
    shell.run(A, "a1", "a2")
    shell.run(B, "b1", "b2", "b3")
    shell.want(C, "c1")
    for request in ("d1", "d2"):
        shell.want(D, request)
        assert shell.table.phase(B) is SlotPhase.CLOSING
        shell.end(D, request)
        assert [shell.table.phase(one) for one in (A, B)] == [SlotPhase.CLOSING, SlotPhase.ACTIVE]


def test_a_slot_that_comes_free_otherwise_takes_the_last_mark_back() -> None:
    shell = Shell(2)
    shell.run(A, "a1", "a2")
    shell.run(B, "b1", "b2", "b3")
    shell.want(C, "c1")
    assert shell.table.phase(A) is SlotPhase.CLOSING
    assert [shell.end(B, f"b{i}") for i in (1, 2, 3)] == [[], [], ["-b"]]
    assert shell.table.phase(A) is SlotPhase.ACTIVE


def test_who_stands_behind_a_request_given_up_takes_its_own_place() -> None:
    shell = Shell(1)
    shell.run(A, "a1")
    shell.want(B, "b1")
    shell.want(C, "c1")
    shell.want(B, "b2")
    assert list(shell.table.snapshot().waiting) == [B, C]
    shell.end(B, "b1")
    assert list(shell.table.snapshot().waiting) == [C, B]
    shell.end(A, "a1")
    assert shell.deactivated(A) == ["+c"]


def test_a_failed_activation_refuses_who_waited_and_frees_the_slot() -> None:
    shell = Shell(1)
    shell.want(A, "a1")
    shell.want(B, "b1")
    assert shell.tell(messages.ActivationFailed(version_id=A, reason="torn")) == ["a1: torn", "+b"]
    assert shell.end(A, "a1") == [], "a refused request is forgotten"


def test_a_loaded_version_takes_a_free_slot_and_nobody_elses() -> None:
    shell = Shell(1)
    assert shell.tell(messages.Loaded(version_id=A)) == ["+a"]
    assert shell.tell(messages.Loaded(version_id=B)) == []
    assert shell.activated(A) == []
    assert shell.tell(messages.Loaded(version_id=B)) == []
    assert shell.want(B, "b1") == ["-a"]


def test_a_dropped_version_leaves_its_slot_however_far_it_was() -> None:
    shell = Shell(2)
    shell.run(A, "a1")
    with pytest.raises(ValueError, match="a@0: cannot be dropped, requests name it"):
        shell.tell(messages.Dropped(version_id=A))
    shell.end(A, "a1")
    assert shell.tell(messages.Dropped(version_id=A)) == ["-a"]
    shell.tell(messages.Loaded(version_id=B))
    assert shell.tell(messages.Dropped(version_id=B)) == []
    assert shell.want(B, "b1") == [], "loaded again, it must be written again"
    assert shell.activated(B) == ["-b"]
    assert shell.deactivated(B) == ["+b"]
    assert shell.activated(B) == ["b1"]
    assert shell.tell(messages.Dropped(version_id=C)) == []


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (messages.Wanted(version_id=B, request_id="a1"), "a1: is already known, for a@0"),
        (messages.Ended(version_id=B, request_id="a1"), "a1: names a@0, not b@0"),
        (messages.Activated(version_id=A), "a@0: is active, not activating"),
        (messages.Deactivated(version_id=A), "a@0: is active, not deactivating"),
        (messages.ActivationFailed(version_id=B, reason=""), "b@0: is in no slot, not activating"),
    ],
)
def test_what_cannot_have_happened_is_refused(event: messages.Event, message: str) -> None:
    shell = Shell(2)
    shell.run(A, "a1")
    with pytest.raises(ValueError, match=message):
        shell.tell(event)
    with pytest.raises(ValueError, match="num_slots: 0; at least 1"):
        SlotTable(num_slots=0)


class SlotMachine(RuleBasedStateMachine):
    """Random requests, ends, loads, drops and answers in any order, beside an engine that believes none
    of it."""

    def __init__(self) -> None:
        super().__init__()
        self.active: set[VersionId] = set()
        self.pending: list[messages.Activate | messages.Deactivate] = []
        self.admitted: dict[str, VersionId] = {}
        self.waiting: dict[str, VersionId] = {}
        self.clock = 0
        self.came_at: dict[str, int] = {}
        self.let_go_at: dict[VersionId, int] = {}
        """When a version with waiting requests gave its slot up."""
        self.doomed: set[VersionId] = set()
        """Dropped while they were being activated."""
        self.promises: dict[str, frozenset[str]] = {}
        """By the first request of a version that lacks a slot: all that may run before it gets one."""
        self.num_activations = 0
        self.num_causes = 0

    @initialize(num_slots=st.integers(1, 4))
    def start(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.table = SlotTable(num_slots=num_slots)

    # -- the model -----------------------------------------------------------------------------

    def tell(self, event: messages.Event) -> None:
        self.clock += 1
        for command in self.table.handle(event):
            self.execute(command)
        self.promise()

    def execute(self, command: messages.Command) -> None:
        match command:
            case messages.Activate(version_id=version):
                taken = self.active | {one.version_id for one in self.pending}
                assert version not in taken
                assert len(taken) < self.num_slots
                if version in self.waiting.values():
                    lacking = set(self.waiting.values()) - taken
                    assert self.place(version) == min(map(self.place, lacking))
                self.pending.append(command)
                self.num_activations += 1
            case messages.Deactivate(version_id=version):
                assert version in self.active
                assert version not in self.admitted.values()
                self.active.remove(version)
                self.pending.append(command)
                if version in self.waiting.values() and version not in self.doomed:
                    self.let_go_at[version] = self.clock
                self.doomed.discard(version)
            case messages.Admit(request_id=request):
                version = self.waiting.pop(request)
                assert version in self.active
                assert version not in self.waiting.values() or self.came_at[request] < min(
                    self.came_at[one] for one, named in self.waiting.items() if named == version
                )
                self.admitted[request] = version
            case messages.Refuse(request_id=request, reason=reason):
                assert reason == "torn"
                del self.waiting[request]

    def first(self, version: VersionId) -> str:
        return min(
            (one for one, named in self.waiting.items() if named == version),
            key=lambda one: self.came_at[one],
        )

    def place(self, version: VersionId) -> int:
        return max(self.came_at[self.first(version)], self.let_go_at.get(version, 0))

    def lacking(self) -> list[VersionId]:
        """Who waits and has no slot, in the order in which slots come to them."""
        coming = {one.version_id for one in self.pending if isinstance(one, messages.Activate)}
        return sorted(set(self.waiting.values()) - self.active - coming, key=self.place)

    def promise(self) -> None:
        """A version waits at most for what was admitted when the slots of one each began to be freed."""
        phases = [slot.phase for slot in self.table.snapshot().slots]
        coming = sum(phase in (SlotPhase.DEACTIVATING, SlotPhase.CLOSING) for phase in phases)
        running = frozenset(self.admitted)
        firsts = [self.first(version) for version in self.lacking()]
        self.promises = {one: self.promises[one] for one in firsts if one in self.promises}
        for request in firsts[: coming + self.num_slots - len(phases)]:
            self.promises.setdefault(request, running)

    def answer(self, command: messages.Activate | messages.Deactivate, *, fails: bool = False) -> None:
        self.pending.remove(command)
        version = command.version_id
        if isinstance(command, messages.Deactivate):
            return self.tell(messages.Deactivated(version_id=version))
        if fails:
            self.doomed.discard(version)
            return self.tell(messages.ActivationFailed(version_id=version, reason="torn"))
        self.active.add(version)
        return self.tell(messages.Activated(version_id=version))

    def end(self, request: str) -> None:
        version = self.admitted.pop(request, None) or self.waiting.pop(request)
        self.tell(messages.Ended(version_id=version, request_id=request))

    # -- what happens --------------------------------------------------------------------------

    @rule(version=st.sampled_from(VERSIONS))
    def want(self, version: VersionId) -> None:
        self.num_causes += 1
        request = f"q{self.num_causes}"
        self.waiting[request], self.came_at[request] = version, self.clock + 1
        self.tell(messages.Wanted(version_id=version, request_id=request))

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.admitted))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.waiting))))

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def acknowledge(self, data: st.DataObject, fails: bool) -> None:
        self.answer(data.draw(st.sampled_from(self.pending)), fails=fails)

    @rule(version=st.sampled_from(VERSIONS))
    def load(self, version: VersionId) -> None:
        self.num_causes += 1
        self.tell(messages.Loaded(version_id=version))

    @rule(version=st.sampled_from(VERSIONS))
    def drop(self, version: VersionId) -> None:
        if version not in self.admitted.values() and version not in self.waiting.values():
            if any(one == messages.Activate(version_id=version) for one in self.pending):
                self.doomed.add(version)
            self.tell(messages.Dropped(version_id=version))

    # -- what must hold ------------------------------------------------------------------------

    @invariant()
    def the_table_agrees_with_the_engine(self) -> None:
        self.table.check_invariants()
        snapshot = self.table.snapshot()
        writable = (SlotPhase.ACTIVE, SlotPhase.CLOSING)
        assert {slot.version_id for slot in snapshot.slots if slot.phase in writable} == self.active
        assert sum(slot.num_admitted for slot in snapshot.slots) == len(self.admitted)
        assert sum(snapshot.waiting.values()) == len(self.waiting)

    @invariant()
    def no_slot_is_written_for_nothing(self) -> None:
        assert self.num_activations <= self.num_causes

    @invariant()
    def nobody_waits_for_requests_admitted_after_it(self) -> None:
        if not self.pending:
            for request, running in self.promises.items():
                assert running & self.admitted.keys(), f"{request} waits for newer requests"

    def teardown(self) -> None:
        """When everything admitted ends and the shell answers, everybody who waits has their turn."""
        if hasattr(self, "table"):
            num_waiting = len(self.waiting)
            for _ in range(2 * (num_waiting + self.num_slots) + 2):
                for command in list(self.pending):
                    self.answer(command)
                for request in sorted(self.admitted):
                    self.end(request)
                self.the_table_agrees_with_the_engine()
            assert not self.waiting
            assert not self.admitted
            assert not self.pending


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
