"""Which adapter versions a replica holds, and which requests use them.

A version's life: (none) → LOADING → RESIDENT → DRAINING → (none). Only RESIDENT versions can be pinned;
a DRAINING one is gone as soon as its last pin is.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from loraserve.engines.base import AdapterFiles
from loraserve.errors import AlreadyExistsError, OverloadedError, StaleError
from placement.types import VersionId


class Residency(Enum):
    """Where one version stands in the pool."""

    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"


@dataclass(slots=True)
class PoolEntry:
    """One version: its files, its state, and the requests that pin it."""

    files: AdapterFiles
    residency: Residency = Residency.LOADING
    pinned_by: set[str] = field(default_factory=set)
    unpinned: asyncio.Event = field(default_factory=asyncio.Event)

    def unpin(self, request_id: str) -> None:
        """Let go; the last to leave a draining version sets `unpinned`."""
        self.pinned_by.discard(request_id)
        if self.residency is Residency.DRAINING and not self.pinned_by:
            self.unpinned.set()


class AdapterPool:
    """Bounded by number and bytes; `check_invariants` holds between any two calls."""

    def __init__(self, *, max_adapters: int, capacity_bytes: int) -> None:
        self.max_adapters = max_adapters
        self.capacity_bytes = capacity_bytes
        self._entries: dict[VersionId, PoolEntry] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of all versions that are not gone yet."""
        return sum(entry.files.size_bytes for entry in self._entries.values())

    def resident(self) -> tuple[VersionId, ...]:
        """The versions that may be named by requests."""
        return self.versions(Residency.RESIDENT)

    def versions(self, residency: Residency) -> tuple[VersionId, ...]:
        """The versions that stand so."""
        return tuple(version for version, one in sorted(self._entries.items()) if one.residency is residency)

    def residency(self, version: VersionId) -> Residency | None:
        """Where the version stands; None if it is not here."""
        entry = self._entries.get(version)
        return None if entry is None else entry.residency

    def rank(self, version: VersionId | None) -> int:
        """The rank of a version that is here, 0 for the base model (None)."""
        return 0 if version is None else self._entries[version].files.rank

    def begin_load(self, files: AdapterFiles) -> bool:
        """Reserve room; False if the version is resident already, so that a repeated load is no error.

        AlreadyExistsError while the same version is loading or draining, OverloadedError without room.
        """
        entry = self._entries.get(files.version_id)
        if entry is not None:
            if entry.residency is Residency.RESIDENT:
                return False
            raise AlreadyExistsError(f"{files.version_id} is {entry.residency.value}; try again later")
        if len(self._entries) >= self.max_adapters:
            raise OverloadedError(
                f"{files.version_id}: the replica holds {self.max_adapters} adapters already, its most"
            )
        free_bytes = self.capacity_bytes - self.used_bytes
        if files.size_bytes > free_bytes:
            raise OverloadedError(
                f"{files.version_id}: needs {files.size_bytes} bytes, the pool has {free_bytes} left"
            )
        self._entries[files.version_id] = PoolEntry(files=files)
        return True

    def finish_load(self, version: VersionId) -> None:
        """The engine acknowledged the load: requests may name the version from now on."""
        self._entries[version].residency = Residency.RESIDENT

    def abandon_load(self, version: VersionId) -> None:
        """The engine refused the load: give the room back."""
        self._entries.pop(version, None)

    def begin_drop(self, version: VersionId) -> PoolEntry | None:
        """Refuse new requests for the version; None if it is not here. Its entry's `unpinned` event is
        set once nobody uses it."""
        entry = self._entries.get(version)
        if entry is None or entry.residency is Residency.LOADING:
            return None
        entry.residency = Residency.DRAINING
        if not entry.pinned_by:
            entry.unpinned.set()
        return entry

    def finish_drop(self, version: VersionId) -> None:
        """The engine let go of the version: give the room back."""
        entry = self._entries.get(version)
        if entry is None:
            return
        if entry.pinned_by:
            raise AssertionError(f"{version} is dropped while {sorted(entry.pinned_by)} use it")
        del self._entries[version]

    @contextmanager
    def pinned(self, version: VersionId | None, request_id: str, *, promised: bool = False) -> Iterator[None]:
        """Keep the version here while the block runs; StaleError if it is not resident.

        None names the base model, which needs no pin. A `promised` request holds a lease, which has
        kept a draining version here for it.
        """
        if version is None:
            yield
            return
        entry = self._entries.get(version)
        usable = (Residency.RESIDENT, Residency.DRAINING) if promised else (Residency.RESIDENT,)
        if entry is None or entry.residency not in usable:
            state = "not here" if entry is None else entry.residency.value
            raise StaleError(f"{version} is {state} on this replica; choose another holder")
        entry.pinned_by.add(request_id)
        try:
            yield
        finally:
            entry.unpin(request_id)

    def pin(self, version: VersionId, pin_id: str) -> bool:
        """Keep a resident version here until `unpin`; False if it is not resident."""
        entry = self._entries.get(version)
        if entry is None or entry.residency is not Residency.RESIDENT:
            return False
        entry.pinned_by.add(pin_id)
        return True

    def unpin(self, version: VersionId, pin_id: str) -> None:
        """Let go of what `pin` kept."""
        entry = self._entries.get(version)
        if entry is not None:
            entry.unpin(pin_id)

    def check_invariants(self, in_flight: frozenset[str]) -> None:
        """AssertionError unless room is respected and every pin belongs to a request in flight."""
        if len(self._entries) > self.max_adapters:
            raise AssertionError(f"{len(self._entries)} adapters in a pool of {self.max_adapters}")
        if self.used_bytes > self.capacity_bytes:
            raise AssertionError(f"{self.used_bytes} bytes in a pool of {self.capacity_bytes}")
        for version, entry in self._entries.items():
            if not entry.pinned_by <= in_flight:
                raise AssertionError(f"{version} is pinned by {sorted(entry.pinned_by - in_flight)}")
