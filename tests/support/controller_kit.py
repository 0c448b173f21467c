"""A controller over a real store, real PEFT files and in-process replicas, and ways to restart it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraserve.clock import Clock
from loraserve.cluster.local_fleet import LocalFleet, MakeFabric
from loraserve.config import Config, parse_config
from loraserve.controller.controller import Checkpoint, Controller
from loraserve.controller.library import open_library
from loraserve.controller.store import Store
from loraserve.engines.base import AdapterFiles, Engine
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import AdapterRejectedError
from placement.profile import Profile
from placement.types import ReplicaId

TIMEOUT_S = 20.0


def small_config(model: Path, *, slots: int = 8, **sections: dict[str, object]) -> Config:
    tree: dict[str, dict[str, object]] = {
        "model": {"path": str(model)},
        "engine": {"kind": "emulated", "pool_adapters": slots},
        "emulated": {"speed": 50.0, "load_bytes_per_s": 1e12},
        "replica": {"check_interval_s": 0.02, "drain_timeout_s": 2.0},
    }
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    return parse_config(tree)


class RefusingEngine(EmulatedEngine):
    """An emulated engine that refuses adapters of one rank, as a real one may."""

    refused_rank: int = 0

    async def load_adapter(self, adapter: AdapterFiles) -> None:
        """Refuse, or load."""
        if adapter.rank == self.refused_rank:
            raise AdapterRejectedError(f"rank {adapter.rank} is not to my taste")
        await super().load_adapter(adapter)


class Setup:
    """A controller, what it stands on, and a way to restart it."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        make_engine: Callable[[ReplicaId, Config], Engine],
        *,
        on_step: Checkpoint | None = None,
        clock: Clock | None = None,
        profile: Profile | None = None,
        make_fabric: MakeFabric | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.fleet = LocalFleet(make_engine, make_fabric=make_fabric)
        self.on_step = on_step
        self.clock = clock
        self.profile = profile
        self._left_open: list[Store] = []
        self.controller = self.make()

    def make(self) -> Controller:
        """A new controller on the same files and replicas."""
        store = Store(self.folder / "controller.sqlite")
        self._left_open.append(store)
        recovering = store.begin_life("run", self.config.model.path)
        library = open_library(self.folder / "adapters", self.config)
        options: dict[str, Any] = {} if self.on_step is None else {"on_step": self.on_step}
        return Controller(
            self.config,
            store=store,
            fleet=self.fleet,
            library=library,
            recovering=recovering,
            first_backoff_s=0.01,
            clock=self.clock,
            profile=self.profile,
            **options,
        )

    async def start(self) -> Controller:
        """Start it and wait until it is ready."""
        self.controller.start()
        await self.controller.wait_until(self.controller.is_ready, TIMEOUT_S)
        return self.controller

    async def restart(self) -> Controller:
        """Stop the controller in order and start another."""
        await self.controller.stop()
        self.controller = self.make()
        return await self.start()

    async def crash(self) -> None:
        """What a SIGKILL leaves: no goodbye, the store as it is, the replicas running on."""
        await self.controller.keeper.close()

    async def close(self) -> None:
        """End everything."""
        await self.controller.stop()
        await self.fleet.close()
        for store in self._left_open:
            store.close()
