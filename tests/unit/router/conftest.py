"""Fixtures that end every router test with a check that nothing is left in flight."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from loraserve.config import RouterSection
from loraserve.router.router import Router
from loraserve.router.testing import FakeController, FakeReplica
from loraserve.rpc.server import make_channel
from tests.support.router_bench import Bench, MakeBench


@pytest.fixture
async def make_bench() -> AsyncIterator[MakeBench]:
    """Builds benches; at the end each router must be idle with its requests conserved."""
    async with AsyncExitStack() as stack:

        async def make(
            replicas: tuple[str, ...] = ("r0", "r1"), *, caches_prefixes: bool = False, **config: Any
        ) -> Bench:
            controller = FakeController()
            await controller.start()
            stack.push_async_callback(controller.stop)
            fakes = {name: FakeReplica(name) for name in replicas}
            for fake in fakes.values():
                await fake.start()
                stack.push_async_callback(fake.stop)
            router = Router(
                msgspec.structs.replace(RouterSection(port=0, holder_wait_s=0.3), **config),
                router_id="router-t",
                controller_address=controller.address,
                cluster_name="test",
                run_id="run",
                caches_prefixes=caches_prefixes,
            )
            port = await router.start()
            channel = make_channel(f"127.0.0.1:{port}")
            bench = Bench(controller=controller, replicas=fakes, router=router, port=port, channel=channel)

            async def close() -> None:
                await channel.close()
                await bench.idle()
                router.check_invariants(idle=True)
                await router.stop(0.0)

            stack.push_async_callback(close)
            return bench

        yield make


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    """Two replicas; adapter `both` on r0 and r1, `one` on r0 alone."""
    made: Bench = await make_bench()
    await made.publish({"both": ("r0", "r1"), "one": ("r0",)})
    await made.serving(True)
    return made
