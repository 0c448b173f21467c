"""Which adapter is active in which engine slot of a replica: events in, commands out, no I/O, no clock.

An engine holds many adapter versions and computes with at most `num_slots` different ones at a time. A
request is given to the engine only while its version is active in a slot. What the pool holds, and how a
slot is written, is the shell's to know.

A version's life in a slot: (none) → ACTIVATING → ACTIVE → DEACTIVATING → (none). Versions that wait for
a slot stand in one line, first come first served. For each of them that no free slot is coming for, one
active version gives its slot up: at once if no admitted request names it (the least recently used one),
else it is marked as closing (the one with the fewest admitted requests). A closing version's new requests
wait, so it goes when those admitted have ended, and what still waits for it joins the end of the line. If
fewer marks are needed the last made are taken back: a version that waits keeps its victim, and others that
come and go cannot hold it up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from placement.slots.messages import (
    Activate,
    Activated,
    ActivationFailed,
    Admit,
    Command,
    Deactivate,
    Deactivated,
    Dropped,
    Ended,
    Event,
    Loaded,
    Refuse,
    Wanted,
)
from placement.types import VersionId


class SlotPhase(Enum):
    """Where a version in a slot stands; CLOSING is active, for its admitted requests alone."""

    ACTIVATING = "activating"
    ACTIVE = "active"
    CLOSING = "closing"
    DEACTIVATING = "deactivating"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotView:
    """One taken slot: its version, its phase, and how many admitted requests name it."""

    version_id: VersionId
    phase: SlotPhase
    num_admitted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSnapshot:
    """The taken slots, in the order in which they were taken, and how many requests wait for each
    version, in the order in which they come next."""

    num_slots: int
    slots: tuple[SlotView, ...]
    waiting: Mapping[VersionId, int]


@dataclass(slots=True)
class _Slot:
    """A taken slot. `is_doomed`: the version was dropped while it was being activated. `used_at`: the
    number of the event that last used it."""

    phase: SlotPhase
    used_at: int
    admitted: set[str] = field(default_factory=set)
    is_doomed: bool = False


@dataclass(slots=True)
class _Queue:
    """The requests that wait for one version, with the number of the event they came with; the version's
    place in the line is that of the oldest, but never before `joined_at`."""

    joined_at: int
    requests: dict[str, int] = field(default_factory=dict)

    @property
    def place(self) -> int:
        return max(self.joined_at, next(iter(self.requests.values())))


class SlotTable:
    """One door: `handle(event) -> commands`. Commands are to be executed in their order; each Activate and
    Deactivate is answered by one event, also if the shell writes one slot after the other."""

    def __init__(self, *, num_slots: int) -> None:
        """ValueError if there is no slot at all."""
        if num_slots < 1:
            raise ValueError(f"num_slots: {num_slots}; at least 1 is needed")
        self.num_slots = num_slots
        self._slots: dict[VersionId, _Slot] = {}
        self._closing: dict[VersionId, None] = {}
        """The versions marked to give up their slots, in the order of marking."""
        self._leaving: set[VersionId] = set()
        """The versions whose slots come free for certain: deactivating, or doomed."""
        self._line: dict[VersionId, _Queue] = {}
        """Who waits, in the order of their places."""
        self._version_of: dict[str, VersionId] = {}
        """Every request that waits or is admitted."""
        self._num_events = 0

    def handle(self, event: Event) -> tuple[Command, ...]:
        """Take one event in and say what is to be done; ValueError for one that cannot be."""
        self._num_events += 1
        commands = self._take_in(event)
        return (*commands, *self._settle())

    def _take_in(self, event: Event) -> list[Command]:
        match event:
            case Wanted(version_id=version, request_id=request):
                return self._on_wanted(version, request)
            case Ended(version_id=version, request_id=request):
                self._on_ended(version, request)
            case Activated(version_id=version):
                return self._on_activated(version)
            case ActivationFailed(version_id=version, reason=reason):
                return self._on_activation_failed(version, reason)
            case Deactivated(version_id=version):
                self._expect(version, SlotPhase.DEACTIVATING)
                del self._slots[version]
                self._leaving.discard(version)
            case Loaded(version_id=version):
                if version not in self._slots and len(self._slots) < self.num_slots and not self._line:
                    return [self._activate(version)]
            case Dropped(version_id=version):
                return self._on_dropped(version)
        return []

    # -- what others ask -----------------------------------------------------------------------

    def phase(self, version: VersionId) -> SlotPhase | None:
        """Where the version stands, or None if it is in no slot."""
        slot = self._slots.get(version)
        return None if slot is None else slot.phase

    def snapshot(self) -> SlotSnapshot:
        """The slots and the line as they are now."""
        slots = tuple(
            SlotView(version_id=version, phase=slot.phase, num_admitted=len(slot.admitted))
            for version, slot in self._slots.items()
        )
        waiting = {version: len(queue.requests) for version, queue in self._line.items()}
        return SlotSnapshot(num_slots=self.num_slots, slots=slots, waiting=waiting)

    def check_invariants(self) -> None:
        """AssertionError unless slots and requests are conserved and nobody waits without need."""
        assert len(self._slots) <= self.num_slots, "more versions than slots"
        named: dict[str, VersionId] = {}
        for version, slot in self._slots.items():
            assert not slot.admitted or slot.phase in (SlotPhase.ACTIVE, SlotPhase.CLOSING), version
            assert (version in self._closing) == (slot.phase is SlotPhase.CLOSING), version
            assert slot.phase is not SlotPhase.CLOSING or slot.admitted, f"{version} is closing and idle"
            assert slot.phase is not SlotPhase.ACTIVE or version not in self._line, f"{version} waits"
            is_leaving = slot.phase is SlotPhase.DEACTIVATING or slot.is_doomed
            assert is_leaving == (version in self._leaving), f"{version} is leaving, or is not"
            named |= dict.fromkeys(slot.admitted, version)
        assert self._leaving <= self._slots.keys(), "a version without a slot is leaving"
        num_waiting = 0
        for version, queue in self._line.items():
            assert queue.requests, f"{version} stands in line for nobody"
            num_waiting += len(queue.requests)
            named |= dict.fromkeys(queue.requests, version)
        assert named == self._version_of, "a request is lost"
        assert len(named) == num_waiting + sum(len(slot.admitted) for slot in self._slots.values())
        places = [queue.place for queue in self._line.values()]
        assert places == sorted(places), "the line is out of order"
        lacking = self._num_lacking()
        if lacking > 0:
            phases = [slot.phase for slot in self._slots.values()]
            assert len(self._slots) == self.num_slots, "a slot is free and a version waits"
            assert len(self._closing) == lacking or SlotPhase.ACTIVE not in phases, "a victim is missing"
            idle = [one for one, slot in self._slots.items() if self._is_idle(slot)]
            assert not idle, f"{idle} are idle and a version waits"
        assert len(self._closing) <= max(0, lacking), "a version is closing for nobody"

    # -- events --------------------------------------------------------------------------------

    def _on_wanted(self, version: VersionId, request: str) -> list[Command]:
        if request in self._version_of:
            raise ValueError(f"{request}: is already known, for {self._version_of[request]}")
        self._version_of[request] = version
        slot = self._slots.get(version)
        if slot is not None and slot.phase is SlotPhase.ACTIVE:
            return [self._admit(slot, request)]
        queue = self._line.setdefault(version, _Queue(joined_at=self._num_events))
        queue.requests[request] = self._num_events
        return []

    def _on_ended(self, version: VersionId, request: str) -> None:
        known = self._version_of.get(request)
        if known is None:
            return
        if known != version:
            raise ValueError(f"{request}: names {known}, not {version}")
        del self._version_of[request]
        slot = self._slots.get(version)
        if slot is not None and request in slot.admitted:
            slot.admitted.remove(request)
            slot.used_at = self._num_events
            return
        queue = self._line[version]
        is_first = next(iter(queue.requests)) == request
        del queue.requests[request]
        if not queue.requests:
            del self._line[version]
        elif is_first:
            self._line = dict(sorted(self._line.items(), key=lambda item: item[1].place))

    def _on_activated(self, version: VersionId) -> list[Command]:
        slot = self._expect(version, SlotPhase.ACTIVATING)
        slot.used_at = self._num_events
        if slot.is_doomed:
            return [self._deactivate(version)]
        slot.phase = SlotPhase.ACTIVE
        return self._admit_waiting(version)

    def _on_activation_failed(self, version: VersionId, reason: str) -> list[Command]:
        slot = self._expect(version, SlotPhase.ACTIVATING)
        del self._slots[version]
        self._leaving.discard(version)
        if slot.is_doomed:
            # Who waits, waits for what was loaded after the drop.
            return []
        commands: list[Command] = []
        queue = self._line.pop(version, None)
        for request in queue.requests if queue is not None else ():
            del self._version_of[request]
            commands.append(Refuse(request_id=request, reason=reason))
        return commands

    def _on_dropped(self, version: VersionId) -> list[Command]:
        slot = self._slots.get(version)
        if version in self._line or (slot is not None and slot.admitted):
            raise ValueError(f"{version}: cannot be dropped, requests name it")
        if slot is not None and slot.phase is SlotPhase.ACTIVATING:
            slot.is_doomed = True
            self._leaving.add(version)
        elif slot is not None and slot.phase is SlotPhase.ACTIVE:
            return [self._deactivate(version)]
        return []

    # -- decisions -----------------------------------------------------------------------------

    def _settle(self) -> list[Command]:
        """Fill free slots from the line, and have as many versions leave as still lack a slot."""
        if not self._line and not self._closing:
            return []
        commands: list[Command] = []
        free = self.num_slots - len(self._slots)
        if free:
            absent = (version for version in self._line if version not in self._slots)
            commands += [self._activate(version) for version in list(islice(absent, free))]
        lacking = self._num_lacking()
        while lacking > 0 and (idle := self._idle()) is not None:
            commands.append(self._deactivate(idle))
            lacking = self._num_lacking()
        while len(self._closing) > max(0, lacking):
            version, _ = self._closing.popitem()
            self._slots[version].phase = SlotPhase.ACTIVE
            commands += self._admit_waiting(version)
        self._mark(lacking - len(self._closing))
        return commands

    def _num_lacking(self) -> int:
        """How many versions in the line have no slot and none that is free or certain to come free."""
        slots, leaving = self._slots, self._leaving
        # Who has a slot and keeps it is being activated for those who wait, or has it still.
        lacking = sum([version not in slots or version in leaving for version in self._line])
        return lacking - (self.num_slots - len(slots)) - len(leaving)

    def _idle(self) -> VersionId | None:
        """A version that no request runs on: one that is marked, or the one that was used last the longest
        ago; None if there is none."""
        idle = [
            (version not in self._closing, slot.used_at, place, version)
            for place, (version, slot) in enumerate(self._slots.items())
            if not slot.admitted and self._is_idle(slot)
        ]
        return min(idle)[-1] if idle else None

    def _mark(self, num_more: int) -> None:
        """Close so many more versions, or as many as there are: the fewest requests to wait for first."""
        if num_more <= 0:
            return
        active = [one for one, slot in self._slots.items() if slot.phase is SlotPhase.ACTIVE]
        active.sort(key=lambda one: (len(self._slots[one].admitted), self._slots[one].used_at))
        for version in active[:num_more]:
            self._slots[version].phase = SlotPhase.CLOSING
            self._closing[version] = None

    # -- steps ---------------------------------------------------------------------------------

    def _activate(self, version: VersionId) -> Activate:
        self._slots[version] = _Slot(SlotPhase.ACTIVATING, self._num_events)
        return Activate(version_id=version)

    def _deactivate(self, version: VersionId) -> Deactivate:
        """Let the slot go. Who waits for a version that was closing joins the end of the line: others wait
        for this very slot, and would lose it to the version that gives it up."""
        slot = self._slots[version]
        if slot.phase is SlotPhase.CLOSING:
            del self._closing[version]
            queue = self._line.pop(version, None)
            if queue is not None:
                queue.joined_at = self._num_events
                self._line[version] = queue
        slot.phase, slot.is_doomed = SlotPhase.DEACTIVATING, False
        self._leaving.add(version)
        return Deactivate(version_id=version)

    def _admit_waiting(self, version: VersionId) -> list[Command]:
        queue = self._line.pop(version, None)
        slot = self._slots[version]
        return [] if queue is None else [self._admit(slot, request) for request in queue.requests]

    def _admit(self, slot: _Slot, request: str) -> Admit:
        slot.admitted.add(request)
        slot.used_at = self._num_events
        return Admit(request_id=request)

    def _expect(self, version: VersionId, phase: SlotPhase) -> _Slot:
        slot = self._slots.get(version)
        if slot is None or slot.phase is not phase:
            found = "in no slot" if slot is None else slot.phase.value
            raise ValueError(f"{version}: is {found}, not {phase.value}")
        return slot

    @staticmethod
    def _is_idle(slot: _Slot) -> bool:
        return not slot.admitted and (slot.phase is SlotPhase.ACTIVE or slot.phase is SlotPhase.CLOSING)
