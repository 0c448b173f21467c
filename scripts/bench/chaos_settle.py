"""What must add up when `scripts/bench/chaos` has killed all it wanted and nothing is in flight."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from loraserve.client import Client
from loraserve.client_types import ClusterStatus
from loraserve.cluster.processes import titled
from loraserve.errors import LoraServeError

SETTLE_S = 40.0
POLL_S = 0.5


async def unsettled(
    routers: Sequence[Client], *, replicas: int, run_id: str, versions: Mapping[str, str]
) -> list[str]:
    """What does not add up, after some time to settle; empty if all does."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        left = await _look(routers, replicas, run_id, versions)
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(POLL_S)


async def _look(
    routers: Sequence[Client], replicas: int, run_id: str, versions: Mapping[str, str]
) -> list[str]:
    left: list[str] = []
    tables = set()
    for client in routers:
        try:
            status = await client.status()
        except LoraServeError as error:
            left.append(f"router {client.addresses[0]}: {error}")
            continue
        tables.add(status.table_version)
        left += _wrong_router(status)
        left += _wrong_cluster(status, replicas, versions)
    if len(tables) > 1:
        left.append(f"table versions {sorted(tables)}")
    left += _wrong_processes(run_id, replicas)
    return list(dict.fromkeys(left))


def _wrong_router(status: ClusterStatus) -> list[str]:
    router, left = status.router, []
    if router.in_flight:
        left.append(f"{router.router_id} has {router.in_flight} requests in flight")
    ended = router.completed + router.failed + router.refused + router.cancelled
    if router.requests != ended + router.in_flight:
        left.append(f"{router.router_id} counts {router.requests} requests, {ended} ended")
    if not status.controller_reachable:
        left.append(f"{router.router_id} does not reach the controller")
    return left


def _wrong_cluster(status: ClusterStatus, replicas: int, versions: Mapping[str, str]) -> list[str]:
    """Replicas that are not ready or still busy; tables and pools that disagree."""
    left = []
    if [one.state for one in status.replicas] != ["ready"] * replicas:
        left.append(f"replicas are {[one.state for one in status.replicas]}")
    named: dict[str, set[str]] = {one.replica_id: set() for one in status.replicas}
    for adapter in status.adapters:
        if versions.get(adapter.name) != adapter.version or not adapter.holders:
            left.append(f"{adapter.name} is {adapter.version} on {len(adapter.holders)} replicas")
        for holder in adapter.holders:
            named[holder.replica_id].add(adapter.version)
    if {one.name for one in status.adapters} != set(versions):
        left.append(f"registered are {[one.name for one in status.adapters]}")
    for one in status.replicas:
        if one.running or one.waiting:
            left.append(f"{one.replica_id} runs {one.running} requests, {one.waiting} wait")
        if set(one.resident) != named[one.replica_id]:
            table = sorted(named[one.replica_id])
            left.append(f"{one.replica_id} holds {sorted(one.resident)}, the table says {table}")
        if one.kv_cache_usage:
            left.append(f"{one.replica_id} uses {one.kv_cache_usage:.3f} of its KV cache")
    return left


def _wrong_processes(run_id: str, replicas: int) -> list[str]:
    """One process for each replica and each engine, one controller: nothing is left of those killed."""
    wanted = {"ray::ReplicaActor": replicas, "cat": replicas, "ray::ControllerActor": 1}
    counts = {title: len(titled(run_id, title)) for title in wanted}
    return [
        f"{counts[key]} processes {key}, not {count}" for key, count in wanted.items() if counts[key] != count
    ]
