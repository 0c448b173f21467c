"""A whole cluster in the test's own event loop: controller, emulated replicas, a router; real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.clock import WallClock
from loraserve.cluster.local_fleet import LocalFleet, MakeFabric
from loraserve.config import Config
from loraserve.controller.controller import Controller
from loraserve.controller.service import add_controller_services
from loraserve.engines.base import Engine
from loraserve.engines.emulated import EmulatedEngine, Sleep
from loraserve.router.router import Router
from loraserve.rpc.server import bind, make_server
from loraserve.samples import SampleSet
from placement.profile import Profile
from placement.types import ReplicaId
from tests.support.controller_kit import Setup, small_config
from tests.support.router_bench import until

START_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """What a test talks to; `address` is the first router's."""

    address: str
    router: Router
    controller: Controller
    fleet: LocalFleet
    addresses: tuple[str, ...]
    routers: tuple[Router, ...]


@asynccontextmanager
async def local_cluster(
    folder: Path,
    samples: SampleSet,
    *,
    num_routers: int = 1,
    profile: Profile | None = None,
    sections: Mapping[str, Any] | None = None,
    sleep: Sleep = asyncio.sleep,
    make_fabric: MakeFabric | None = None,
) -> AsyncIterator[LocalCluster]:
    """Two replicas that serve the sample adapters, whose engines pass their time with `sleep`; ends with a
    check that nothing is in flight."""
    given: dict[str, Any] = {"router": {"port": 0}, **(sections or {})}
    config = small_config(samples.model, **given)

    def engine(replica: ReplicaId, config: Config) -> Engine:
        return EmulatedEngine(config.engine, config.emulated, config.model, clock=WallClock(), sleep=sleep)

    async with AsyncExitStack() as stack:
        setup = Setup(folder, config, engine, profile=profile, make_fabric=make_fabric)
        stack.push_async_callback(setup.close)
        controller = await setup.start()
        server = make_server()
        add_controller_services(controller, server)
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        stack.push_async_callback(server.stop, None)
        for name, adapter in samples.adapters.items():
            await controller.register(name, str(adapter), replace=False)
        routers, addresses = [], []
        for index in range(num_routers):
            router = Router(
                config.router,
                router_id=f"router-{index}",
                controller_address=f"127.0.0.1:{port}",
                cluster_name="test",
            )
            addresses.append(f"127.0.0.1:{await router.start()}")
            routers.append(router)
            stack.push_async_callback(router.stop, 0.0)
        await until(lambda: all(_knows_all(router, samples) for router in routers), START_S)
        yield LocalCluster(
            address=addresses[0],
            router=routers[0],
            controller=controller,
            fleet=setup.fleet,
            addresses=tuple(addresses),
            routers=tuple(routers),
        )
        await until(lambda: all(router.counters.in_flight == 0 for router in routers), START_S)
        for router in routers:
            router.check_invariants(idle=True)


def _knows_all(router: Router, samples: SampleSet) -> bool:
    return router.serving and len(router.table.entries) == len(samples.adapters)
