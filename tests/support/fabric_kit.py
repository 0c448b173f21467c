"""Fabrics in one process: adapters made to order, and a transport whose every stage a test can reach into."""

import asyncio
import gc
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from loraserve.adapters.segment import build_segment
from loraserve.clock import Clock
from loraserve.fabric.counts import FabricCounts
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import FabricOptions, PeerAddress, Wanted
from loraserve.pace import Pace
from loraserve.transport.base import Buffer, Progress, Region, Transport
from loraserve.transport.memory import Fault, FaultKind, MemoryNet, MemoryTransport
from placement.types import AdapterName, version_id
from tests.support.adapter_maker import PREFIX, AdapterMaker
from tests.support.segments import own_segments

WAIT_S = 20.0
"""How long a test waits for something that must happen."""

PLENTY = 2**30
PIECE_BYTES = 256 * 1024


async def until(condition: Callable[[], bool]) -> None:
    """Give the other tasks and threads turns until the condition holds, which nobody announces."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Stage:
    """A place in a fetch where it stands still until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()

    def stand(self) -> None:
        """In the fetching thread."""
        self.reached.set()
        assert self.released.wait(WAIT_S), "nobody let the fetch go on"

    async def wait(self) -> None:
        """On the loop: until the fetch stands here."""
        assert await asyncio.to_thread(self.reached.wait, WAIT_S), "the fetch never came here"

    def go(self) -> None:
        """Let it go on."""
        self.released.set()


@dataclass
class Hooks:
    """What happens at each stage of what this transport fetches; they run in the fetching thread and may
    raise; `on_piece` gives what is told of a piece. Faults of the serving end are the transport's own."""

    before_head: Callable[[str], None] = lambda key: None
    change_head: Callable[[bytes, int], tuple[bytes, int]] = lambda head, size: (head, size)
    before_body: Callable[[str, Callable[[], bool]], None] = lambda key, stop: None
    on_piece: Callable[[int, int], tuple[int, int]] = lambda begin, end: (begin, end)
    after_body: Callable[[str], None] = lambda key: None


@dataclass
class StagedTransport:
    """Another transport with hooks; `asked` lists (what, key) of what it was asked to fetch."""

    inner: Transport
    hooks: Hooks = field(default_factory=Hooks)
    asked: list[tuple[str, str]] = field(default_factory=list)
    scheme: str = field(init=False)
    takes_device_memory: bool = False
    piece_bytes: int = field(init=False)
    pace: Pace | None = None

    def __post_init__(self) -> None:
        self.scheme = self.inner.scheme
        self.piece_bytes = self.inner.piece_bytes

    @property
    def address(self) -> bytes:
        return self.inner.address

    def publish(self, key: str, region: Region) -> None:
        self.inner.publish(key, region)

    def withdraw(self, key: str) -> None:
        self.inner.withdraw(key)

    def read_head(self, address: bytes, key: str, *, idle_timeout_s: float) -> tuple[bytes, int]:
        self.asked.append(("head", key))
        self.hooks.before_head(key)
        return self.hooks.change_head(*self.inner.read_head(address, key, idle_timeout_s=idle_timeout_s))

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
        self.asked.append(("body", key))
        self.hooks.before_body(key, stop)

        def on_piece(begin: int, end: int) -> None:
            on_bytes(*self.hooks.on_piece(begin, end))

        self.inner.fetch(address, key, into, on_bytes=on_piece, idle_timeout_s=idle_timeout_s, stop=stop)
        self.hooks.after_body(key)

    def active_bytes(self) -> int:
        return self.inner.active_bytes()

    def close(self) -> None:
        self.inner.close()


@dataclass
class Node:
    """One replica's fabric."""

    name: str
    fabric: Fabric
    transports: tuple[StagedTransport, ...]

    @property
    def hooks(self) -> Hooks:
        """Of the first transport."""
        return self.transports[0].hooks

    @property
    def peer(self) -> PeerAddress:
        """As the others know it."""
        return PeerAddress(replica_id=self.name, addresses=self.fabric.addresses)

    def inject(self, kind: FaultKind, at_byte: int = 0, *, scheme: int = 0) -> Fault:
        """Let this happen to those who fetch from here over its first transport, or another."""
        return self.memory(scheme).inject(Fault(kind=kind, at_byte=at_byte))

    def stop_before_the_body(self, *wanted: Wanted) -> Stage:
        """Have the fetches of these versions stand still between head and body."""
        stage, keys = Stage(), {one.version_id for one in wanted}

        def before_body(key: str, stop: Callable[[], bool]) -> None:
            if key in keys:
                stage.stand()

        self.hooks.before_body = before_body
        return stage

    def die(self) -> None:
        """As a process that is killed: what others fetch from it ends."""
        for transport in self.transports:
            transport.inner.close()

    def memory(self, scheme: int = 0) -> MemoryTransport:
        """What is below its first transport, or another."""
        inner = self.transports[scheme].inner
        assert isinstance(inner, MemoryTransport)
        return inner

    @property
    def counts(self) -> FabricCounts:
        return self.fabric.counts()

    def check(self, *, idle: bool = False) -> None:
        self.fabric.check_invariants(idle=idle)


class Library:
    """Adapters as the control plane knows them, each made once."""

    def __init__(self, directory: Path) -> None:
        self._make = AdapterMaker(directory)
        self._made: dict[tuple[str, int, int], Wanted] = {}

    def __call__(self, name: str = "a", *, seed: int = 0, width: int = 16) -> Wanted:
        """A version of this name, from the origin alone; its one module has rank 4 and `width`."""
        key = (name, seed, width)
        if key not in self._made:
            self._made[key] = self._wanted(name, seed, width)
        return self._made[key]

    def large(self, name: str = "a", *, seed: int = 0) -> Wanted:
        """One whose body has several chunks."""
        return self(name, seed=seed, width=90_000)

    def _wanted(self, name: str, seed: int, width: int) -> Wanted:
        rng = np.random.default_rng((seed, width, *name.encode()))
        tensors = {
            f"{PREFIX}.q_proj.lora_A.weight": rng.random((4, width), np.float32),
            f"{PREFIX}.q_proj.lora_B.weight": rng.random((width, 4), np.float32),
        }
        folder = self._make(tensors=tensors, target_modules=["q_proj"])
        first = build_segment(folder, name="x@0", digest=None, max_lora_rank=64)
        digest = first.decoded.digest
        first.close()
        version = version_id(AdapterName(name), digest)
        segment = build_segment(folder, name=version, digest=digest, max_lora_rank=64)
        try:
            return Wanted(
                version_id=version,
                digest=digest,
                rank=segment.rank,
                size_bytes=segment.size_bytes,
                head_sha256=hashlib.sha256(segment.head).hexdigest(),
                directory=folder,
                max_lora_rank=64,
            )
        finally:
            segment.close()


def from_peers(wanted: Wanted, *nodes: Node, origin: bool = False) -> Wanted:
    """The same version, to be had from these replicas."""
    peers = tuple(node.peer for node in nodes)
    return replace(wanted, peers=peers, directory=wanted.directory if origin else None)


def segments_mapped() -> int:
    """How many mappings of segments this process has."""
    return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").count("/memfd:loraserve-")


class Town:
    """Fabrics that can reach each other; when it ends, all of them must be empty."""

    def __init__(self) -> None:
        self._nets: dict[str, MemoryNet] = {}
        self.nodes: list[Node] = []

    def __call__(
        self,
        name: str,
        *,
        capacity_bytes: int = PLENTY,
        clock: Clock | None = None,
        schemes: tuple[str, ...] = ("memory",),
        **options: object,
    ) -> Node:
        """A replica with a fabric."""
        nets = [self._nets.setdefault(one, MemoryNet(scheme=one, piece_bytes=PIECE_BYTES)) for one in schemes]
        transports = tuple(StagedTransport(net.open(name)) for net in nets)
        made = FabricOptions(**options)  # type: ignore[arg-type]
        fabric = Fabric(transports, capacity_bytes=capacity_bytes, options=made, clock=clock)
        node = Node(name, fabric, transports)
        self.nodes.append(node)
        return node

    async def holder(self, name: str, *wanted: Wanted, schemes: tuple[str, ...] = ("memory",)) -> Node:
        """A replica that has these versions from the origin."""
        node = self(name, schemes=schemes)
        for one in wanted:
            await node.fabric.acquire(one)
        return node

    async def close(self) -> None:
        """Close all fabrics; nothing of them may be left."""
        for node in self.nodes:
            node.check()
            await node.fabric.close()
            await node.fabric.close()
        for node in self.nodes:
            node.check(idle=True)
            counts = node.fabric.counts()
            left = counts.held_bytes + counts.cached_bytes + counts.in_flight_bytes + counts.leaving_bytes
            assert left == 0, f"{left} bytes are left of {node.name}: {counts}"
        assert own_segments() == 0
        assert segments_mapped() == 0


@asynccontextmanager
async def a_town() -> AsyncIterator[Town]:
    """Fabrics for one test; nothing of them may be left at its end."""
    town = Town()
    yield town
    # A failed test's traceback may keep its segments.
    gc.collect()
    await town.close()
