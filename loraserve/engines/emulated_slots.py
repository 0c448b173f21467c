"""The emulated engine's batch behind its adapter slots: a request enters once its adapter is active.

Slots are written in no time; which adapter has one is decided by the same state machine as for vLLM.
"""

from collections import deque
from collections.abc import Iterator

from loraserve.engines.batching import Batch, Sequence
from placement.adapter_slots import SlotTable
from placement.adapter_slots_messages import (
    Activate,
    Activated,
    Admit,
    Deactivate,
    Deactivated,
    Dropped,
    Ended,
    Event,
    Wanted,
)
from placement.types import VersionId


class SlottedBatch:
    """Requests of a batch with at most `num_slots` different adapters in it, and those before it."""

    def __init__(self, batch: Batch, *, num_slots: int) -> None:
        self._batch = batch
        self._table = SlotTable(num_slots=num_slots)
        self._outside: dict[str, Sequence] = {}
        self._version_of: dict[str, VersionId] = {}

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._batch
        yield from self._outside.values()

    @property
    def num_outside(self) -> int:
        """Requests that wait for a slot."""
        return len(self._outside)

    def add(self, sequence: Sequence, version: VersionId | None) -> None:
        """Queue a request; None names the base model, which needs no slot."""
        if version is None:
            self._batch.add(sequence)
            return
        self._outside[sequence.request_id] = sequence
        self._version_of[sequence.request_id] = version
        self._tell(Wanted(version_id=version, request_id=sequence.request_id))

    def remove(self, request_id: str) -> None:
        """Take a request out, wherever it is; one that is not here is no error."""
        self._outside.pop(request_id, None)
        self._batch.remove(request_id)
        version = self._version_of.pop(request_id, None)
        if version is not None:
            self._tell(Ended(version_id=version, request_id=request_id))

    def drop(self, version: VersionId) -> None:
        """Free the version's slot; no request may name it."""
        self._tell(Dropped(version_id=version))

    def check_invariants(self) -> None:
        """AssertionError unless requests, tokens and slots are conserved."""
        self._batch.check_invariants()
        self._table.check_invariants()
        named = {one.request_id: self._version_of.get(one.request_id) for one in self._batch}
        versions = set(named.values()) - {None}
        assert len(versions) <= self._table.num_slots, f"{versions} in {self._table.num_slots} slots"
        assert self._version_of.keys() <= named.keys() | self._outside.keys(), "a request is lost"

    def _tell(self, event: Event) -> None:
        events = deque([event])
        while events:
            for command in self._table.handle(events.popleft()):
                match command:
                    case Activate(version_id=version):
                        events.append(Activated(version_id=version))
                    case Deactivate(version_id=version):
                        events.append(Deactivated(version_id=version))
                    case Admit(request_id=request):
                        self._batch.add(self._outside.pop(request))
