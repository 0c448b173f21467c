"""Scheme `memory`: both ends in one process, with faults at chosen bytes; the public test double.

Deterministic: pieces come in a fixed order, and a fault happens at its byte whatever the timing.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from loraserve.errors import AlreadyExistsError, UnavailableError
from loraserve.pace import Pace
from loraserve.transport.base import (
    BadPeerError,
    Buffer,
    FetchStoppedError,
    NotPublishedError,
    PeerGoneError,
    PeerSlowError,
    Progress,
    Region,
)
from loraserve.transport.published import InUse, check_region

SLICE_S = 0.01


class FaultKind(Enum):
    """What goes wrong at the serving end."""

    REFUSE = "nobody can connect, not even for a head"
    NOT_PUBLISHED = "the key is said not to be there"
    WRONG_HEAD = "one bit of the head is another"
    DIE = "the peer is gone after `at_byte` bytes"
    STALL = "nothing comes after `at_byte` bytes, until `release` is set"
    FLIP = "the lowest bit of byte `at_byte` is another"
    SHORT = "the body ends after `at_byte` bytes"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fault:
    """A fault of one serving end; `times` says how often it happens, None: always.

    `reached` is set when it first happens; `release` ends a stall.
    """

    kind: FaultKind
    at_byte: int = 0
    key: str | None = None
    times: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class MemoryNet:
    """The processes that reach each other: `open` one transport for each."""

    def __init__(
        self, *, scheme: str = "memory", piece_bytes: int = 1024**2, backwards: bool = False
    ) -> None:
        self.scheme = scheme
        self.piece_bytes = piece_bytes
        self.backwards = backwards
        self._numbers = itertools.count(1)
        self._ends: dict[bytes, MemoryTransport] = {}

    def open(self, name: str = "peer") -> "MemoryTransport":
        """Another process; its address is its name and a number."""
        end = MemoryTransport(self, f"{name}#{next(self._numbers)}".encode())
        self._ends[end.address] = end
        return end

    def reach(self, address: bytes) -> "MemoryTransport":
        """The end at this address; PeerGoneError if it is closed or never was."""
        end = self._ends.get(address)
        if end is None or end.closed:
            raise PeerGoneError(f"nobody is at {address!r}")
        return end


class MemoryTransport:
    """One end. `heads_read` and `bodies_read` count by key how often others came for what it serves."""

    takes_device_memory = False

    def __init__(self, net: MemoryNet, address: bytes) -> None:
        self.scheme = net.scheme
        self.address = address
        self.closed = False
        self.heads_read: Counter[str] = Counter()
        self.bodies_read: Counter[str] = Counter()
        self.in_use = InUse()
        self.piece_bytes = net.piece_bytes
        self.pace: Pace | None = None
        self._net = net
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}
        self._faults: list[Fault] = []
        self._happened: Counter[int] = Counter()

    def inject(self, fault: Fault) -> Fault:
        """Let this happen to those who come from now on; returns it."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """No faults any more; what stalls goes on."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release.set()

    def publish(self, key: str, region: Region) -> None:
        """Serve the region under this key; BadInputError, AlreadyExistsError."""
        check_region(key, region)
        with self._lock:
            if self.closed:
                raise UnavailableError("this transport is closed")
            if key in self._regions:
                raise AlreadyExistsError(f"{key} is published already; withdraw it first")
            self._regions[key] = region

    def withdraw(self, key: str) -> None:
        """Serve it no more; transfers that run go on to their end."""
        with self._lock:
            self._regions.pop(key, None)

    def read_head(self, address: bytes, key: str, *, idle_timeout_s: float) -> tuple[bytes, int]:
        """The region's head, and how many bytes its body has. TransportError."""
        self._check_open()
        peer = self._net.reach(address)
        region = peer.find(key, peer.heads_read)
        if peer.happens(FaultKind.WRONG_HEAD, key) is None:
            return region.head, region.size_bytes
        head = bytearray(region.head or b"\0")
        head[-1] ^= 1
        return bytes(head), region.size_bytes

    def fetch(
        self,
        address: bytes,
        key: str,
        into: Buffer,
        *,
        on_bytes: Progress,
        idle_timeout_s: float,
        stop: Callable[[], bool],
    ) -> None:
        """Fill `into` with the body, or with what a fault makes of it. TransportError."""
        self._check_open()
        peer = self._net.reach(address)
        region = peer.find(key, peer.bodies_read)
        with memoryview(into) as given, given.cast("B") as body:
            if len(body) != region.size_bytes:
                raise BadPeerError(f"the body of {key} has {region.size_bytes} bytes, not {len(body)}")
            with self.in_use.holding(len(body)), peer.in_use.holding(len(body)):
                transfer = _Transfer(self, peer, key, idle_timeout_s=idle_timeout_s, stop=stop)
                transfer.run(region, body, self._net, on_bytes)

    def active_bytes(self) -> int:
        """Bytes of regions that are being read by or from this end now."""
        return self.in_use.bytes

    def close(self) -> None:
        """Serve nothing and end every transfer; safe to call twice."""
        self.closed = True
        with self._lock:
            self._regions.clear()

    def find(self, key: str, counter: "Counter[str]") -> Region:
        """What is served under the key, counted."""
        if self.happens(FaultKind.REFUSE, key) is not None:
            raise PeerGoneError(f"{self.address!r} cannot be reached")
        absent = self.happens(FaultKind.NOT_PUBLISHED, key) is not None
        with self._lock:
            region = self._regions.get(key)
            if region is None or absent:
                raise NotPublishedError(f"{key} is not published over {self.scheme}")
            counter[key] += 1
            return region

    def happens(self, kind: FaultKind, key: str, begin: int = 0, end: int = 1) -> Fault | None:
        """The fault of this kind, if one is to happen now to bytes [begin, end) of the key's body."""
        with self._lock:
            for fault in self._faults:
                if fault.kind is not kind or fault.key not in (None, key):
                    continue
                if not begin <= fault.at_byte < end or self._happened[id(fault)] == fault.times:
                    continue
                self._happened[id(fault)] += 1
                fault.reached.set()
                return fault
        return None

    def _check_open(self) -> None:
        if self.closed:
            raise FetchStoppedError("this transport is closed")


class _Transfer:
    """One body on its way."""

    def __init__(
        self,
        here: MemoryTransport,
        peer: MemoryTransport,
        key: str,
        *,
        idle_timeout_s: float,
        stop: Callable[[], bool],
    ) -> None:
        self._here = here
        self._peer = peer
        self._key = key
        self._idle_timeout_s = idle_timeout_s
        self._stop = stop

    def run(self, region: Region, into: memoryview, net: MemoryNet, on_bytes: Progress) -> None:
        size_bytes, piece_bytes = len(into), self._here.piece_bytes
        begins = list(range(0, size_bytes, piece_bytes))
        with memoryview(region.body) as given, given.cast("B") as body:
            for begin in reversed(begins) if net.backwards else begins:
                end = min(begin + piece_bytes, size_bytes)
                self._check()
                self._piece(body, into, begin, end)
                on_bytes(begin, end)
        # A fault at the body's very end happens once all is in place.
        self._check()
        self._piece(memoryview(b""), into, size_bytes, size_bytes + 1)

    def _piece(self, body: memoryview, into: memoryview, begin: int, end: int) -> None:
        for kind in (FaultKind.STALL, FaultKind.DIE, FaultKind.SHORT):
            fault = self._peer.happens(kind, self._key, begin, end)
            if fault is None:
                continue
            into[begin : fault.at_byte] = body[begin : fault.at_byte]
            if kind is FaultKind.DIE:
                raise PeerGoneError(f"{self._peer.address!r} died after {fault.at_byte} bytes of {self._key}")
            if kind is FaultKind.SHORT:
                raise BadPeerError(f"the body of {self._key} ended after {fault.at_byte} bytes")
            self._stall(fault)
        if begin >= len(into):
            return
        into[begin:end] = body[begin:end]
        flip = self._peer.happens(FaultKind.FLIP, self._key, begin, end)
        if flip is not None:
            into[flip.at_byte] ^= 1

    def _stall(self, fault: Fault) -> None:
        give_up_at = time.monotonic() + self._idle_timeout_s
        while not fault.release.wait(SLICE_S):
            self._check()
            if time.monotonic() >= give_up_at:
                raise PeerSlowError(f"{self._peer.address!r} sent nothing for {self._idle_timeout_s:g} s")

    def _check(self) -> None:
        if self._stop() or self._here.closed:
            raise FetchStoppedError(f"stopped fetching {self._key}")
        if self._peer.closed:
            raise PeerGoneError(f"{self._peer.address!r} is gone")
