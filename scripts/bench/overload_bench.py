"""Measures what overload does to goodput, on a real cluster with the emulated engine.

Two clusters one after the other, with router.early_refusal on and off: Ray, controller, two replicas
and the routers, each replica so slow by its latency model that neither routers nor client come near a
core. Every request has the same deadline, three times what the longest takes alone, at least two
seconds. First a closed loop finds the capacity; then requests arrive at random (Poisson) at 1, 2 and 5 times
of it, whatever becomes of those before.

  capacity_per_s      requests finished per second with twice as many in flight as the engines run
  goodput_per_s       requests finished inside their deadline per second, the first deadline's left out
  goodput_over_peak   over the highest of all levels and the capacity, of that cluster
  refused, late       ended with RESOURCE_EXHAUSTED; with DEADLINE_EXCEEDED
  mean_refusal_ms     from sending a request to its refusal
  rss_mb_*            resident memory of routers and replicas: before the levels, after them, highest
  cpu_*               cores used, on average over a level
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_common as common
import overload_load as load

from loraserve.cluster.processes import titled
from loraserve.folders import cache_dir
from loraserve.samples import build_samples

TIMES = (1, 2, 5)
REPLICAS = 2
SEQUENCES = 16
MIN_DEADLINE_S = 2.0
SAMPLE_S = 0.5
TITLES = {"router": "ray::RouterActor", "replica": "ray::ReplicaActor"}
TARGET = 0.9
FLAT = 1.1
"""Memory that grows by no more than this counts as flat."""

CONFIG = """
[cluster]
name = "{name}"
replicas = {replicas}
[model]
path = "{model}"
[engine]
kind = "emulated"
max_num_seqs = {sequences}
[emulated]
base_step_ms = 25.0
prefill_token_ms = 0.2
decode_seq_ms = 1.0
[router]
port = 0
routers = {routers}
early_refusal = {early_refusal}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How long each part takes."""

    alone_calls: int
    closed_s: float
    level_s: float


FULL = Sizes(alone_calls=5, closed_s=12.0, level_s=20.0)
QUICK = Sizes(alone_calls=2, closed_s=5.0, level_s=6.0)


class Processes:
    """Routers and replicas of a running cluster, as the system sees them."""

    def __init__(self, run_id: str) -> None:
        self.pids = {kind: titled(run_id, title) for kind, title in TITLES.items()}
        self.highest_mb = dict.fromkeys(TITLES, 0.0)

    def rss_mb(self) -> dict[str, float]:
        """Resident memory now, summed over the processes of a kind."""
        found = {kind: sum(_rss_mb(pid) for pid in pids) for kind, pids in self.pids.items()}
        for kind, megabytes in found.items():
            self.highest_mb[kind] = max(self.highest_mb[kind], megabytes)
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, user and system, summed over the processes of a kind."""
        found = {kind: sum(common.cpu_s(pid) for pid in pids) for kind, pids in self.pids.items()}
        return {**found, "client": common.cpu_s(os.getpid())}

    async def watch(self) -> None:
        """Look at the memory again and again, until cancelled."""
        while True:
            self.rss_mb()
            await asyncio.sleep(SAMPLE_S)


def _rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


@contextmanager
def cluster(
    options: argparse.Namespace, *, early_refusal: bool
) -> Iterator[tuple[list[str], list[str], str]]:
    """A cluster with the sample adapters: its routers' addresses, the adapters, the run's id."""
    samples = build_samples(cache_dir() / "samples")
    config = CONFIG.format(
        name="{cluster}",
        replicas=REPLICAS,
        model=samples.model,
        sequences=SEQUENCES,
        routers=options.routers,
        early_refusal="true" if early_refusal else "false",
    )
    with common.cluster("overload", config) as (running, _):
        for adapter, source in samples.adapters.items():
            common.loraserve("overload", "adapter", "add", adapter, str(source), "--cluster", running.name)
        yield list(running.router_addresses), list(samples.adapters), running.run_id


async def measure(
    addresses: Sequence[str], adapters: Sequence[str], run_id: str, sizes: Sizes, options: argparse.Namespace
) -> dict[str, Any]:
    """All levels on one cluster."""
    caller = load.Caller(addresses, adapters, options.seed)
    processes = Processes(run_id)
    alone_s = await load.alone_s(caller, sizes.alone_calls)
    deadline_s = options.deadline_s or max(MIN_DEADLINE_S, 3 * alone_s)
    capacity_per_s = await load.closed_loop(caller, 2 * REPLICAS * SEQUENCES, sizes.closed_s)
    _say(f"alone {alone_s:.2f} s, deadline {deadline_s:.2f} s, capacity {capacity_per_s:.1f}/s")
    before = processes.rss_mb()
    watch = asyncio.create_task(processes.watch())
    levels: dict[str, dict[str, float]] = {}
    for times in TIMES:
        cpu_s, began_s = processes.cpu_s(), time.perf_counter()
        level = await load.open_loop(caller, times * capacity_per_s, sizes.level_s, deadline_s)
        seconds = time.perf_counter() - began_s
        used = {f"cpu_{kind}": (now - cpu_s[kind]) / seconds for kind, now in processes.cpu_s().items()}
        levels[f"{times}x"] = {**level.figures(), **used}
        _say(f"{times}x: goodput {level.good / level.window_s:.1f}/s, {dict(level.statuses)}")
    after = processes.rss_mb()
    watch.cancel()
    await caller.close()
    peak = max(capacity_per_s, *(figures["goodput_per_s"] for figures in levels.values()))
    for figures in levels.values():
        figures["goodput_over_peak"] = figures["goodput_per_s"] / peak
    return {
        "alone_s": alone_s,
        "deadline_s": deadline_s,
        "capacity_per_s": capacity_per_s,
        "levels": levels,
        **{f"rss_mb_{kind}_before": value for kind, value in before.items()},
        **{f"rss_mb_{kind}_after": value for kind, value in after.items()},
        **{f"rss_mb_{kind}_highest": value for kind, value in processes.highest_mb.items()},
        "memory_flat": all(processes.highest_mb[kind] <= FLAT * before[kind] for kind in before),
    }


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """The same with floats of four places."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def headline(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that the targets are about, with early refusal."""
    on = found["early_refusal_on"]
    return {
        **{f"goodput_{key}_over_peak": one["goodput_over_peak"] for key, one in on["levels"].items()},
        "memory_flat": on["memory_flat"],
    }


def print_table(found: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """The figures for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns: dict[str, Callable[[Mapping[str, float]], str]] = {
        "offered/s": lambda one: f"{one['offered_per_s']:.1f}",
        "goodput/s": lambda one: f"{one['goodput_per_s']:.1f}",
        "over peak": lambda one: f"{one['goodput_over_peak']:.2f}",
        "refused": lambda one: f"{one['refused']:.0f}",
        "late": lambda one: f"{one['late']:.0f}",
        "failed": lambda one: f"{one['failed']:.0f}",
        "refusal ms": lambda one: f"{one['mean_refusal_ms']:.1f}",
    }
    table = Table("refusal", "load", *columns)
    for key in ("early_refusal_on", "early_refusal_off"):
        for times, one in found[key]["levels"].items():
            table.add_row(
                key.removeprefix("early_refusal_"), times, *(show(one) for show in columns.values())
            )
    console.print(table)
    on = found["early_refusal_on"]
    console.print(
        f"capacity {on['capacity_per_s']:.1f}/s, deadline {on['deadline_s']:.2f} s; memory "
        + ", ".join(
            f"{kind} {on[f'rss_mb_{kind}_before']:.0f} → {on[f'rss_mb_{kind}_after']:.0f} MB"
            f" (highest {on[f'rss_mb_{kind}_highest']:.0f})"
            for kind in TITLES
        ),
        highlight=False,
    )
    used = {kind: max(one[f"cpu_{kind}"] for one in on["levels"].values()) for kind in (*TITLES, "client")}
    console.print("cores used at most: " + ", ".join(f"{kind} {cores:.2f}" for kind, cores in used.items()))
    lowest = min(one["goodput_over_peak"] for one in on["levels"].values())
    met = "met" if lowest >= TARGET else "MISSED"
    console.print(f"goodput over its peak with early refusal: lowest {lowest:.2f}, target ≥ {TARGET}: {met}")
    console.print(", ".join(f"{key} {value}" for key, value in told.items()), highlight=False)


def main() -> int:
    """Measure and print."""
    parser = common.parser("overload", __doc__, quick="about a minute, to see that it works")
    parser.add_argument(
        "--routers", type=common.at_least_one, default=2, help="routers; requests go to them in turn (2)"
    )
    parser.add_argument("--deadline-s", type=common.seconds, help="instead of three times the longest one's")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and requests (0)")
    options = parser.parse_args()
    common.end_in_order_when_told()
    sizes = QUICK if options.quick else FULL
    found: dict[str, Any] = {}
    for early_refusal in (True, False):
        key = f"early_refusal_{'on' if early_refusal else 'off'}"
        _say(key)
        with cluster(options, early_refusal=early_refusal) as (addresses, adapters, run_id):
            found[key] = asyncio.run(measure(addresses, adapters, run_id, sizes, options))
    found = rounded({**headline(found), **found})
    told = common.conditions("overload", replicas=REPLICAS, routers=options.routers, seed=options.seed)
    if options.json:
        print(json.dumps({**found, **told}))
    else:
        print_table(found, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
