"""The copies of one replica, with an engine that a test can look into and a fabric that it can reach into."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from loraserve.config import Config, parse_config
from loraserve.engines.base import AdapterFiles
from loraserve.errors import AdapterRejectedError
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import Wanted
from loraserve.replica.loading import Copies
from loraserve.replica.pool import AdapterPool
from placement.types import ReplicaId, VersionId
from tests.support.fabric_kit import PLENTY, Node, Town, until
from tests.support.replica_bench import HeldEngine

RANK = 4
"""Of the library's adapters."""


class Engine(HeldEngine):
    """Keeps what it was given, refuses what the test says, and wants one change at a time."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.engine, config.emulated, config.model)
        self.given: dict[VersionId, AdapterFiles] = {}
        self.refused: set[VersionId] = set()
        self._is_changing = False

    async def load_adapter(self, adapter: AdapterFiles) -> None:
        self.given[adapter.version_id] = adapter
        if adapter.version_id in self.refused:
            raise AdapterRejectedError(f"{adapter.version_id} is not to my taste")
        with self._alone():
            await super().load_adapter(adapter)
        self.check_segments()

    async def unload_adapter(self, version_id: VersionId) -> None:
        self.check_segments()
        with self._alone():
            await super().unload_adapter(version_id)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert not self._is_changing, "it takes one change at a time"
        self._is_changing = True
        try:
            yield
        finally:
            self._is_changing = False

    def check_segments(self) -> None:
        """AssertionError if memory was given back that the engine may still map."""
        for version in self._adapters:
            segment = self.given[version].segment
            assert segment is None or segment.fd >= 0, f"{version} is closed under the engine"


@dataclass
class Replica:
    """The copies of one replica, and what they are made of."""

    copies: Copies
    pool: AdapterPool
    engine: Engine
    node: Node

    async def load(self, wanted: Wanted, *peers: Node) -> str:
        """Load, from these peers alone or else from the folder; where the bytes came from."""
        fetched = await self.copies.load(files_of(wanted, peers), tuple(peer.peer for peer in peers))
        return "" if fetched is None else fetched.source

    def check_idle(self) -> None:
        """No copy is here, and none comes."""
        self.node.check(idle=True)
        assert self.node.counts.held_bytes == 0
        assert self.pool.used_bytes == 0
        self.engine.check_invariants()


def files_of(wanted: Wanted, peers: tuple[Node, ...] = ()) -> AdapterFiles:
    """As the controller tells it; with peers, without a folder that could be read instead."""
    assert wanted.directory is not None
    return AdapterFiles(
        version_id=wanted.version_id,
        directory=wanted.directory / "elsewhere" if peers else wanted.directory,
        rank=wanted.rank,
        size_bytes=wanted.size_bytes,
        digest=wanted.digest,
        head_sha256=wanted.head_sha256,
    )


MakeReplica = Callable[..., Awaitable[Replica]]


async def some_copies(
    fabric: Fabric | None, *, max_bytes: int = PLENTY, max_lora_rank: int = RANK
) -> tuple[Copies, AdapterPool, Engine]:
    """Copies with a started engine, and their pool; no request runs."""
    engine = Engine(parse_config({"engine": {"kind": "emulated"}}))
    pool = AdapterPool(max_adapters=8, capacity_bytes=PLENTY)
    await engine.start()

    async def end_running(requests: object) -> None:
        raise AssertionError(f"no request runs here: {requests}")

    copies = Copies(
        ReplicaId("replica"),
        pool=pool,
        engine=engine,
        fabric=fabric,
        max_lora_rank=max_lora_rank,
        max_bytes=max_bytes,
        drain_timeout_s=5.0,
        end_running=end_running,
    )
    return copies, pool, engine


@asynccontextmanager
async def one_replica(
    town: Town, *, capacity_bytes: int = PLENTY, max_bytes: int = PLENTY, max_lora_rank: int = RANK
) -> AsyncIterator[Replica]:
    """Copies with an emulated engine and a fabric in the town; at the end they are dropped."""
    node = town("replica", capacity_bytes=capacity_bytes)
    copies, pool, engine = await some_copies(node.fabric, max_bytes=max_bytes, max_lora_rank=max_lora_rank)
    made = Replica(copies, pool, engine, node)
    yield made
    for version in pool.resident():
        await copies.unload(version)
    await copies.stop()
    await until(lambda: node.fabric.is_idle)
    made.check_idle()
    engine.given.clear()
    await engine.close()
