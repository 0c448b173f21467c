"""Kills processes and cuts links of a real cluster under load, and accounts for every request.

A cluster of the emulated engine (Ray, controller, four replicas, two routers) and, where network
namespaces can be made, a third router in one of its own. The Python client sends requests all the
time, half of them to replicas directly and half through routers; what each must say is known
beforehand, token by token. Meanwhile replicas, their engines' processes, controller and routers get
SIGKILL, and the third router's links to clients or to the cluster are cut for a while. Every few
seconds an adapter's weights are replaced. With --rebalance-every a plan drawn at random, which leaves no
replica a free place, is applied so often.

  lost               requests that ended neither with their whole right answer nor with an error that
                     says so
  duplicated         requests with tokens a second time, or with two ends
  wrong_adapter      requests answered by other weights than those they named
  resumed            completed requests that went on elsewhere, by router or client, after a loss
  ended_unavailable  ended with UNAVAILABLE and the tokens so far; ..._resumable: of those that could
                     have gone on; ..._replaced: of those that could have, had their weights not been
                     replaced meanwhile
  refused            ended with RESOURCE_EXHAUSTED
  recovery_p99_s     from a kill (a link: from when it is whole again) until a request was answered
                     that needed what was killed
  restored_p99_s     the same until it is back: a replica ready, the controller and all replicas, a
                     router serving with the controller in reach
  longest_pause_s    between two messages of one stream, or before the first, until the first kill
  unsettled          what did not add up in the end: requests in flight, pools, tables, processes
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import bench_common as common
from chaos_account import Bucket, Kind, percentile, plan_kills
from chaos_load import Load, Oracle
from chaos_netns import ApartRouter, why_not
from chaos_plans import Rebalancer
from chaos_settle import unsettled
from chaos_versions import Replacer, Versions
from chaos_victims import Monkey, Recovery, Sight, Watcher

from loraserve.client import Client
from loraserve.cluster.state import RunningCluster, cluster_dir
from loraserve.folders import cache_dir
from loraserve.samples import build_samples

REPLICAS, ROUTERS, WORKERS = 4, 2, 28
ADAPTERS = 8
READY_S = 60.0
NUM_SLOWEST = 5
CALM_S = 3.0
"""Before the first kill: what is wrong then is wrong without any."""

# Off the defaults: restarts come far more often here than an operator would let pass; three adapters on
# each of four replicas leave some of eight adapters with one holder; steps and loads are slow enough to
# be met by a kill.
CONFIG = """
[cluster]
name = "{name}"
replicas = {replicas}
[model]
path = "{model}"
[engine]
kind = "emulated"
pool_adapters = 3
[emulated]
base_step_ms = 35.0
load_bytes_per_s = 2e7
engine_process = true
[placement]
epoch_s = 15.0
[replica]
max_restarts = 1000
[router]
port = 0
routers = {routers}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A running cluster and what it was made from: `versions` by adapter name, `sources` by digest."""

    running: RunningCluster
    folder: Path
    config: Path
    model: Path
    versions: dict[str, str]
    sources: dict[str, str]


@contextmanager
def cluster() -> Iterator[Ground]:
    """The cluster with its adapters; ended whatever happens."""
    samples = build_samples(cache_dir() / "samples")
    text = CONFIG.format(name="{cluster}", replicas=REPLICAS, model=samples.model, routers=ROUTERS)
    with common.cluster("chaos", text) as (running, config):
        sources = [str(path) for path in samples.adapters.values()]
        wanted = {f"adapter-{index}": sources[index % len(sources)] for index in range(ADAPTERS)}
        versions = asyncio.run(_register(running.router_addresses[0], wanted))
        yield Ground(
            running=running,
            folder=cluster_dir(running.name),
            config=config,
            model=samples.model,
            versions=versions,
            sources={version.rpartition("@")[2]: wanted[name] for name, version in versions.items()},
        )


async def _register(address: str, wanted: dict[str, str]) -> dict[str, str]:
    async with Client(address) as client:
        return {
            name: (await client.register_adapter(name, source)).version for name, source in wanted.items()
        }


@contextmanager
def router_apart(ground: Ground, unwilling: str) -> Iterator[ApartRouter | None]:
    """The router in a namespace of its own, unless there is a reason against it."""
    if unwilling:
        yield None
        return
    apart = ApartRouter(
        controller=ground.running.controller_address,
        cluster=ground.running.name,
        config=ground.config,
        log=ground.folder / "logs" / "router-apart.log",
        run_id=ground.running.run_id,
    )
    try:
        apart.make()
        yield apart
    finally:
        apart.close()


@asynccontextmanager
async def clients(addresses: list[str]) -> AsyncIterator[tuple[dict[str, Client], Client, list[Client]]]:
    """Those of the load by mode, one for whoever watches, and one for each router."""
    async with AsyncExitStack() as stack:
        modes = {
            "look_aside": Client(addresses),
            "proxied": Client(addresses, look_aside=False),
        }
        admin = Client(addresses, management_timeout_s=5.0)
        each = [Client(address, management_timeout_s=5.0) for address in addresses]
        for client in (*modes.values(), admin, *each):
            await stack.enter_async_context(client)
        yield modes, admin, each


async def measure(
    ground: Ground,
    apart: ApartRouter | None,
    plan: list[Kind],
    options: argparse.Namespace,
    on_kill: Callable[[int], None],
) -> dict[str, Any]:
    """Load, kills, settling; all figures."""
    addresses = [*ground.running.router_addresses, *([apart.address] if apart else [])]
    rng = Random(options.seed)
    async with clients(addresses) as (modes, admin, each):
        for client in each:
            await client.wait_ready(READY_S)
        versions = Versions(ground.versions)
        load = Load(modes, versions, Oracle(str(ground.model)), Random(rng.random()))
        watcher = Watcher(admin)
        watching = asyncio.create_task(watcher.run())
        sight = Sight(run_id=ground.running.run_id, addresses=addresses, admin=admin, each=each)
        monkey = Monkey(sight, watcher, load, apart, Random(rng.random()))
        replacer = Replacer(each[0], versions, ground.sources, Random(rng.random()))
        begun_s = time.monotonic()
        load.start(WORKERS)
        beside = [asyncio.create_task(replacer.run())]
        rebalancer = Rebalancer(each[-1], options.rebalance_every or 1.0, Random(rng.random()))
        if options.rebalance_every:
            beside.append(asyncio.create_task(rebalancer.run()))
        try:
            await asyncio.sleep(max(CALM_S, options.calm))
            load.is_calm = False
            await monkey.run(plan, on_kill)
        finally:
            replacer.stop()
            rebalancer.stop()
            await asyncio.gather(*beside)
            await load.stop()
            watching.cancel()
        duration_s = time.monotonic() - begun_s
        left = await unsettled(
            each, replicas=REPLICAS, run_id=ground.running.run_id, versions=versions.all_newest()
        )
    replaced = {"replaced": replacer.replaced, "replacements_undone": replacer.undone}
    plans = {
        "plans_applied": rebalancer.applied,
        "plans_refused": rebalancer.refused,
        "plans_unanswered": rebalancer.unanswered,
        "planned_bytes_moved": rebalancer.bytes_moved,
    }
    rest = {"unsettled": left, "duration_s": round(duration_s, 1)}
    return {**_figures(load, monkey), **replaced, **plans, **rest}


def _figures(load: Load, monkey: Monkey) -> dict[str, Any]:
    recoveries = monkey.recoveries
    buckets = load.tally.buckets
    return {
        "kills": sum(monkey.by_kind.values()),
        "kills_by_kind": {kind.value: count for kind, count in sorted(monkey.by_kind.items())},
        "kills_of_last_holders": monkey.last_holders,
        "requests": load.tally.issued,
        **{bucket.value: buckets[bucket] for bucket in Bucket},
        "ended_unavailable_resumable": load.unavailable["resumable"],
        "ended_unavailable_replaced": load.unavailable["replaced"],
        "resumed": load.resumed,
        "sent_again": load.sent_again,
        "requests_by_mode": dict(sorted(load.by_mode.items())),
        "requests_by_kind": dict(sorted(load.by_kind.items())),
        "longest_request_s": round(load.longest_s, 2),
        "longest_request": load.longest,
        "longest_pause_s": round(load.longest_pause_s, 2),
        "recovery_p99_s": _rounded(percentile(_known(recoveries, "served_s"), 0.99)),
        "restored_p99_s": _rounded(percentile(_known(recoveries, "restored_s"), 0.99)),
        "recovery_by_kind": {kind.value: _by_kind(recoveries, kind) for kind in Kind},
        "slowest": [_line(one) for one in sorted(recoveries, key=_slowness, reverse=True)[:NUM_SLOWEST]],
        "not_recovered": [
            asdict(one) for one in recoveries if one.served_s is None or one.restored_s is None
        ],
        "notes": load.notes,
    }


def _by_kind(recoveries: list[Recovery], kind: Kind) -> dict[str, float | None]:
    own = [one for one in recoveries if one.kind is kind]
    return {
        f"{name}_{what}_s": _rounded(percentile(_known(own, f"{what}_s"), share))
        for what in ("served", "restored")
        for name, share in (("median", 0.5), ("max", 1.0))
    }


def _slowness(one: Recovery) -> float:
    return max(one.served_s or 0.0, one.restored_s or 0.0)


def _line(one: Recovery) -> str:
    served_s, restored_s = _rounded(one.served_s), _rounded(one.restored_s)
    return f"{one.at_s:.1f} s: {one.kind} {one.what}: served after {served_s} s, back after {restored_s} s"


def _known(recoveries: list[Recovery], name: str) -> list[float]:
    return [value for one in recoveries if (value := getattr(one, name)) is not None]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def failures(found: dict[str, Any]) -> list[str]:
    """What of the requirements is not met."""
    never = ("lost", "duplicated", "wrong_adapter", "ended_unavailable_resumable")
    wrong = [f"{key}: {found[key]}" for key in never if found[key]]
    accounted = sum(found[bucket.value] for bucket in Bucket)
    if accounted != found["requests"]:
        wrong.append(f"{found['requests']} requests, {accounted} accounted for")
    wrong += [f"not recovered: {one}" for one in found["not_recovered"]]
    return wrong + [f"unsettled: {one}" for one in found["unsettled"]]


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the standard error; what is not a terminal gets a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("kills", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    begun_s = time.monotonic()

    def say(done: int) -> None:
        if done == total or done % max(1, total // 20) == 0:
            print(
                f"  {time.monotonic() - begun_s:6.1f} s  {done} of {total} kills", file=sys.stderr, flush=True
            )

    yield say


def show(found: dict[str, Any]) -> None:
    """The figures for a person."""
    for note in found["notes"]:
        print(f"  {note}")
    for key, value in found.items():
        if key not in ("notes", "conditions"):
            print(f"{key:28} {value}")
    for key, value in found["conditions"].items():
        print(f"  {key:26} {value}")


def main() -> int:
    """Kill, count and print; 1 if a requirement is not met."""
    parser = common.parser("chaos", __doc__, quick="10 kills, about a minute")
    parser.add_argument("--kills", type=common.at_least_one, help="how many (200)")
    parser.add_argument("--calm", type=float, default=CALM_S, help="seconds before the first kill (3)")
    parser.add_argument("--rebalance-every", type=float, metavar="SECONDS", help="apply plans so often")
    parser.add_argument("--seed", type=int, default=0, help="of kills and requests (0)")
    options = parser.parse_args()
    num_kills = options.kills or (10 if options.quick else 200)
    common.end_in_order_when_told()
    unwilling = why_not()
    if unwilling:
        print(f"  no links are cut: {unwilling}", file=sys.stderr, flush=True)
    plan = plan_kills(num_kills, links=not unwilling, seed=options.seed)
    with cluster() as ground, router_apart(ground, unwilling) as apart, progress(num_kills) as on_kill:
        found = asyncio.run(measure(ground, apart, plan, options, on_kill))
    found["seed"] = options.seed
    found["conditions"] = common.conditions(
        "chaos",
        links=unwilling or "a router in a network namespace, its links to clients or cluster set down",
        replicas=REPLICAS,
        routers=ROUTERS + (0 if unwilling else 1),
        adapters=ADAPTERS,
        in_flight=WORKERS,
        config="replica.max_restarts = 1000, placement.epoch_s = 15, engine.pool_adapters = 3",
    )
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    wrong = failures(found)
    for line in wrong:
        print(f"chaos: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
