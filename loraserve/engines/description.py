"""What a replica says of itself to the controller, as values that both sides know."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraserve.engines.base import EngineInfo, SlotMemory
from placement.types import ReplicaSpec, VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricPlace:
    """Where a replica's adapters can be fetched from: its machine's name, and its address in each transport
    scheme, the preferred one first; none: it takes and gives nothing. `cached` are the versions that it keeps
    and no copy needs."""

    host: str = ""
    addresses: tuple[tuple[str, bytes], ...] = ()
    cached: tuple[VersionId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Where a load's bytes came from: `cache`, `origin` or a transport's scheme; from a peer, how many they
    were and how long they took on the link."""

    source: str
    peer: str = ""
    size_bytes: int = 0
    transfer_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricTotals:
    """What a replica's fabric has done since it began: loads, bytes and seconds by where they came from
    (`cache`, `origin`, or a transport's scheme), failed attempts by kind, and bytes that are here now;
    `cached` are the versions that no copy needs."""

    loads: Mapping[str, int] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    held_bytes: int = 0
    cached_bytes: int = 0
    open_breakers: tuple[str, ...] = ()
    cached: tuple[VersionId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaDescription:
    """What a ready replica says of itself to the controller; `pid` is its own process.

    `loading` and `dropping` are on their way in and out, `draining` that it takes no new requests; `tokens`
    are what its reports have counted so far.
    """

    spec: ReplicaSpec
    address: str
    resident: tuple[VersionId, ...]
    engine: EngineInfo
    pid: int
    incarnation: str
    loading: tuple[VersionId, ...] = ()
    dropping: tuple[VersionId, ...] = ()
    draining: bool = False
    tokens: Mapping[VersionId, int] = field(default_factory=dict)
    fabric: FabricPlace = field(default_factory=FabricPlace)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """A request in a replica: about how long its prompt is, what it has drawn, and will at most.

    One that cannot be gone on with elsewhere exactly, or that was moved often, may not move.
    """

    request_id: str
    version_id: VersionId | None
    prompt_tokens: int
    drawn_tokens: int
    remaining_tokens: int
    may_move: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTotals:
    """How one adapter was served: requests that ended or were turned away, those of them inside their
    targets, and those that met no active copy of it and had to wait for one."""

    requests: int = 0
    in_slo: int = 0
    cold_misses: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """A replica's state for operators, and what it was asked for.

    `tokens` are prompt and output tokens by version since the `incarnation` began, of what was served, what
    waits and what was turned away, which the controller takes demand from; `service` is how that went;
    `sequence` grows by one per report of it.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    resident: tuple[VersionId, ...]
    resident_bytes: int
    slots: SlotMemory = field(default_factory=SlotMemory)
    incarnation: str = ""
    sequence: int = 0
    tokens: Mapping[VersionId, int] = field(default_factory=dict)
    service: Mapping[VersionId, ServiceTotals] = field(default_factory=dict)
    fabric: FabricTotals = field(default_factory=FabricTotals)
