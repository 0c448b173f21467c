"""A router that the network cuts off from its controller, and finds it again."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from loraserve.client import Client
from loraserve.controller.service import add_controller_services
from loraserve.request import SamplingParams
from loraserve.router.router import Router
from loraserve.rpc.server import bind, make_server
from loraserve.samples import SampleSet
from placement.types import AdapterName, ReplicaId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.cuttable import cuttable_path
from tests.support.router_bench import until

R1 = ReplicaId("replica-1")
A_MINUTE_S = 60.0
"""In earnest: longer than keepalives, timeouts and pauses between attempts to connect."""

PAUSE_S = 0.05

FEW = SamplingParams(max_tokens=4)


@pytest.mark.slow
async def test_a_router_without_its_controller_serves_on_and_catches_up(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup(router={"port": 0})
    controller = await one.start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    await controller.wait_until(lambda: len(controller.state.holders(version)) == 2, TIMEOUT_S)
    server = make_server()
    add_controller_services(controller, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        path = await stack.enter_async_context(cuttable_path(port))
        router = Router(
            one.config.router,
            router_id="router-0",
            controller_address=f"127.0.0.1:{path.port}",
            cluster_name="test",
        )
        client = Client(f"127.0.0.1:{await router.start()}", look_aside=False)
        stack.push_async_callback(router.stop, 0.0)
        stack.push_async_callback(client.close)
        await until(lambda: router.table.version == controller.table.version, TIMEOUT_S)
        last = router.table

        path.cut()
        await controller.register("b", str(samples.adapters["rank-16"]), replace=False)
        await one.fleet.lose(R1)
        await controller.wait_until(
            lambda: one.fleet.starts.count(R1) == 2 and len(controller.state.holders(version)) == 2, TIMEOUT_S
        )
        served = 0
        until_s = asyncio.get_running_loop().time() + A_MINUTE_S
        while asyncio.get_running_loop().time() < until_s:
            answer = await client.complete((1, 2, 3), adapter="a", sampling=FEW)
            assert answer.served_by.replica == "replica-0", "the other one is at an address not heard of"
            served += 1
            await asyncio.sleep(PAUSE_S)
        assert served > 0
        assert router.table is last
        assert router.serving
        assert controller.table.version > last.version

        path.heal()
        await until(lambda: router.table.version == controller.table.version, TIMEOUT_S)
        assert AdapterName("b") in router.table.entries
        assert (await client.complete((1, 2, 3), adapter="b", sampling=FEW)).step.output_tokens == 4
        await until_served_by(client, "replica-1")
    router.check_invariants(idle=True)


async def until_served_by(client: Client, replica: str) -> None:
    """Ask until the replica answers."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await client.complete((1, 2, 3), adapter="a", sampling=FEW)).served_by.replica != replica:
            pass
