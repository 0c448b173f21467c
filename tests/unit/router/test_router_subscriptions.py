"""Routing tables and load reports: what is taken, what is dropped, what holds while a peer is away."""

import asyncio
import logging
import socket
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraserve.config import RouterSection
from loraserve.errors import BadInputError, ConfigError
from loraserve.router.router import Router
from loraserve.router.testing import table_of
from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.v1 import management_pb2
from placement.types import ReplicaId
from tests.support.router_bench import Bench, MakeBench, ask, code_of, until

Code = grpc.StatusCode
SERVICES = ("", "loraserve.v1.Inference", "loraserve.v1.Management", "inference.GRPCInferenceService")


async def test_health_is_not_serving_until_a_table_lists_a_replica(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench()
    assert [await bench.health(service) for service in SERVICES] == ["NOT_SERVING"] * len(SERVICES)
    await bench.controller.publish(table_of(1, {}))
    await until(lambda: bench.router.table.version == 1)
    assert await bench.health() == "NOT_SERVING"
    bench.version = 1
    await bench.publish({})
    await bench.serving(True)
    assert [await bench.health(service) for service in SERVICES] == ["SERVING"] * len(SERVICES)
    await bench.controller.publish(table_of(3, {}))
    await bench.serving(False)
    assert await bench.health() == "NOT_SERVING"


async def test_a_watcher_of_health_sees_the_change(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench()
    stub: Any = health_pb2_grpc.HealthStub(bench.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="loraserve.v1.Inference"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await bench.publish({})
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_the_router_serves_on_while_the_controller_is_away_and_learns_when_it_is_back(
    bench: Bench,
) -> None:
    await bench.controller.stop()
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.OK
    assert bench.router.serving
    await bench.controller.start()
    await bench.publish({"new": ("r1",)})
    assert await code_of(bench.inference.Complete(ask("new"))) is Code.OK


async def test_an_older_table_is_dropped_even_from_a_controller_that_came_back(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.version = 5
    await bench.publish({"one": ("r0",)})
    with caplog.at_level(logging.WARNING):
        await bench.controller.publish(table_of(3, {}))
        await until(lambda: "routing table 3 dropped: table 6 is in use" in caplog.text)
        await bench.controller.stop()
        await bench.controller.publish(table_of(4, {}))
        await bench.controller.start()
        await until(lambda: "routing table 4 dropped: table 6 is in use" in caplog.text)
    assert bench.router.table.version == 6
    assert bench.router.serving


async def test_a_table_of_another_protocol_is_refused_by_name(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench: Bench = await make_bench()
    await bench.publish({"one": ("r0",)})
    await bench.serving(True)
    with caplog.at_level(logging.ERROR):
        await bench.controller.publish(table_of(2, {}), protocol_version=PROTOCOL_VERSION + 1)
        await bench.serving(False)
    assert f"speaks version {PROTOCOL_VERSION + 1} and this side {PROTOCOL_VERSION}" in caplog.text
    assert bench.router.table.version == 1
    bench.version = 2
    await bench.publish({"one": ("r0",)})
    await bench.serving(True)


async def test_a_controller_that_refuses_the_protocol_leaves_the_router_not_serving(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench: Bench = await make_bench()
    await bench.controller.stop()
    bench.controller.refusal = Code.INVALID_ARGUMENT
    with caplog.at_level(logging.ERROR):
        await bench.controller.start()
        await until(lambda: "the controller refuses this router" in caplog.text)
    assert not bench.router.serving


async def test_the_router_tells_the_controller_its_protocol_and_name(bench: Bench) -> None:
    request = bench.controller.watch_requests[0]
    assert (request.protocol_version, request.router_id) == (PROTOCOL_VERSION, "router-t")


async def test_a_replica_that_moves_is_reached_at_its_new_address(bench: Bench) -> None:
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.OK
    replica = bench.replicas["r0"]
    await replica.stop()
    await replica.start()
    await bench.publish({"one": ("r0",)})
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.OK


async def test_requests_of_a_replica_that_left_the_table_run_on(bench: Bench) -> None:
    replica = bench.replicas["r0"]
    go_on = asyncio.Event()
    original = replica.script

    async def waits(request):  # type: ignore[no-untyped-def]
        await go_on.wait()
        async for message in original(request):
            yield message

    replica.script = waits
    call = asyncio.ensure_future(bench.inference.Complete(ask("one")))
    await replica.arrived.wait()
    await bench.controller.publish(table_of(2, {"r1": bench.replicas["r1"].address}))
    await until(lambda: bench.router.table.version == 2)
    go_on.set()
    assert (await call).text == "abc"


async def test_load_reports_steer_requests_away_from_the_busy_replica(bench: Bench) -> None:
    for name, running in (("r0", 50), ("r1", 0)):
        await bench.replicas[name].watched.wait()
        bench.replicas[name].report(sequence=1, running=running)

    def is_known() -> bool:
        load = bench.router.loads.view().loads.get(ReplicaId("r0"))
        return load is not None and load.running == 50

    await until(is_known)
    for _ in range(10):
        await bench.inference.Complete(ask("both"))
    assert len(bench.replicas["r0"].received) == 0
    assert len(bench.replicas["r1"].received) == 10


async def test_a_changed_adapter_is_answered_once_this_router_can_route_to_it(bench: Bench) -> None:
    published: list[asyncio.Task[None]] = []

    def register() -> int:
        published.append(asyncio.ensure_future(bench.publish({"fresh": ("r0",)}, wait=False)))
        return 2

    bench.controller.on_register = register
    answer = await bench.management.RegisterAdapter(
        management_pb2.RegisterAdapterRequest(name="fresh", source="/adapters/fresh")
    )
    assert answer.adapter.name == "fresh"
    assert await code_of(bench.inference.Complete(ask("fresh"))) is Code.OK


async def test_the_controllers_refusal_reaches_the_client(bench: Bench) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.management.RegisterAdapter(management_pb2.RegisterAdapterRequest(name="x", source="bad"))
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert caught.value.details() == "adapter_config.json: missing"


async def test_status_comes_from_the_controller_with_the_routers_counters(bench: Bench) -> None:
    await bench.inference.Complete(ask("one"))
    status = await bench.management.GetStatus(management_pb2.GetStatusRequest())
    assert status.cluster == "from-the-controller"
    assert status.controller_reachable
    assert (status.router.router_id, status.router.requests, status.router.completed) == ("router-t", 1, 1)


async def test_status_comes_from_the_last_table_while_the_controller_is_away(bench: Bench) -> None:
    await bench.controller.stop()
    status = await bench.management.GetStatus(management_pb2.GetStatusRequest())
    assert not status.controller_reachable
    assert (status.cluster, status.table_version, status.base_model) == ("test", 1, "base")
    assert {adapter.name for adapter in status.adapters} == {"both", "one"}
    assert {replica.replica_id for replica in status.replicas} == {"r0", "r1"}
    code = await code_of(bench.management.ListAdapters(management_pb2.ListAdaptersRequest()))
    assert code is Code.UNAVAILABLE


async def test_reflection_lists_the_services(bench: Bench) -> None:
    channel: Any = bench.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    stream = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await stream.read()
    assert {service.name for service in answer.list_services_response.service} == {
        "loraserve.v1.Inference",
        "loraserve.v1.Management",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def router(**config: object) -> Router:
    return Router(
        RouterSection(**config),  # type: ignore[arg-type]
        router_id="r",
        controller_address="127.0.0.1:1",
        cluster_name="test",
    )


async def test_a_busy_port_is_bad_input() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInputError, match=f"port: cannot listen at 127.0.0.1:{port}"):
            await router(port=port).start()


async def test_a_public_host_needs_the_flag() -> None:
    with pytest.raises(BadInputError, match="--insecure-listen"):
        await router(host="0.0.0.0", port=0).start()


def test_an_unknown_routing_policy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"router\.routing: .*least-outstanding, .*weighted-share"):
        router(routing="best")


async def test_a_router_can_be_stopped_twice_and_refuses_while_it_drains(bench: Bench) -> None:
    replica = bench.replicas["r0"]
    go_on = asyncio.Event()
    original = replica.script

    async def waits(request):  # type: ignore[no-untyped-def]
        await go_on.wait()
        async for message in original(request):
            yield message

    replica.script = waits
    held = asyncio.ensure_future(bench.inference.Complete(ask("one")))
    await replica.arrived.wait()
    stopping = asyncio.ensure_future(bench.router.stop(10.0))
    await until(lambda: not bench.router.serving)
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.UNAVAILABLE
    go_on.set()
    assert (await held).text == "abc"
    await stopping
    await bench.router.stop(10.0)
