"""Measures placement policies by themselves, without a cluster or a simulation.

  plan_ms            milliseconds of one plan of `optimal` from scratch, median over --repeats, by adapters x
                     replicas; ranks 8 to 128, popularity by Zipf, room for eight copies of everything
  again_ms           the same where the present plan is as good as any
  changed_ms         the same where all demand was dealt anew since the present plan was made
  plan_peak_bytes    the most memory that planning the largest of them allocates
  choose_us          microseconds of one marginal-cost routing decision, by holders
  routing_us         by holders: that and what happens between decisions, each with what it has prepared for
                     them, and all of it per request; `unprepared` is the same if nothing is prepared
  utilisation_gap    per policy: how far the highest utilisation of a plan is above the smallest fluid one
                     over all tier counts, memory included, on --instances instances of 2 to 64 replicas
  moved_bytes_ratio  bytes that `optimal` loads while popularity slides from rank 128 to rank 8 over 20
                     epochs, over those of `loraserve`; three seeds, the first placement not counted

With --out the instances, plans and figures are written there, for another program to compute again.
"""

import json
import sys
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import bench_common as common
import numpy as np
from choose_bench import both_us

from placement.policies import POLICIES
from placement.types import Placement, Snapshot, VersionId

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.fluid_check import plan_utilisation, smallest_utilisation
from tests.support.placement_instances import Instance, drawn

OURS, RIVAL = "optimal", "loraserve"
SIZES = ((1000, 16), (10_000, 64), (100_000, 1000))
COPIES = 8.0
EPOCHS, SEEDS = 20, 3
SLOW = 40
"""Instances that policies are compared on in the whole; `optimal` alone is judged on all."""


def main() -> int:
    made = common.parser("placement", __doc__, "small sizes and few instances")
    made.add_argument("--instances", type=common.at_least_one, default=300, metavar="N", help="(%(default)s)")
    made.add_argument("--repeats", type=common.at_least_one, default=5, metavar="N", help="(%(default)s)")
    made.add_argument("--out", type=Path, metavar="DIR", help="write instances, plans and figures there")
    options = made.parse_args()
    sizes = SIZES[:2] if options.quick else SIZES
    instances = drawn(30 if options.quick else options.instances)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = common.conditions(
        "placement", instances=len(instances), repeats=options.repeats
    )
    figures |= _times(sizes, options.repeats)
    figures["plan_peak_bytes"] = _peak_bytes(*sizes[-1])
    figures["routing_us"] = routing = both_us()
    figures["choose_us"] = {holders: found["prepared"]["choose"] for holders, found in routing.items()}
    figures["utilisation_gap"] = _gaps(instances, options.out)
    figures["moved_bytes_ratio"], figures["moved_bytes"] = _moved(options.out)
    text = json.dumps(figures, indent=None if options.json else 2)
    if options.out is not None:
        (options.out / "figures.json").write_text(text + "\n")
    print(text)
    return 0


def _sized(adapters: int, replicas: int) -> Snapshot:
    return Instance(seed=0, replicas=replicas, adapters=adapters, popularity="skewed", room=COPIES).snapshot()


def _times(sizes: Sequence[tuple[int, int]], repeats: int) -> dict[str, Mapping[str, float]]:
    plan_ms, again_ms, changed_ms = {}, {}, {}
    for adapters, replicas in sizes:
        snapshot = _sized(adapters, replicas)
        policy = POLICIES[OURS]
        plan = policy.plan(snapshot)
        settled = replace(snapshot, current=plan)
        name = f"{adapters}x{replicas}"
        plan_ms[name] = median(_ms(snapshot) for _ in range(repeats))
        again_ms[name] = median(_ms(settled) for _ in range(repeats))
        changed = replace(settled, demand_tokens_per_s=_dealt_anew(snapshot.demand_tokens_per_s))
        changed_ms[name] = median(_ms(changed) for _ in range(repeats))
    return {"plan_ms": plan_ms, "again_ms": again_ms, "changed_ms": changed_ms}


def _dealt_anew(demand: Mapping[VersionId, float]) -> dict[VersionId, float]:
    rates = np.random.default_rng(1).permutation(list(demand.values()))
    return dict(zip(demand, rates.tolist(), strict=True))


def _ms(snapshot: Snapshot) -> float:
    begun_s = time.perf_counter()
    POLICIES[OURS].plan(snapshot)
    return (time.perf_counter() - begun_s) * 1e3


def _peak_bytes(adapters: int, replicas: int) -> int:
    snapshot = _sized(adapters, replicas)
    tracemalloc.start()
    try:
        POLICIES[OURS].plan(snapshot)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _gaps(instances: Sequence[Instance], out: Path | None) -> dict[str, dict[str, float]]:
    gaps: dict[str, list[float]] = {name: [] for name in sorted(POLICIES)}
    rows = []
    for place, instance in enumerate(instances):
        snapshot = instance.snapshot()
        best = smallest_utilisation(snapshot)
        for name in gaps if place < SLOW else (OURS,):
            plan = POLICIES[name].plan(snapshot)
            used = plan_utilisation(snapshot, plan)
            gaps[name].append(used / best - 1)
            if out is not None:
                rows.append(
                    {"instance": asdict(instance), "policy": name, "smallest": best, "utilisation": used}
                    | {"holders": _plain(plan)}
                )
        _tell(place + 1, len(instances))
    if out is not None:
        (out / "plans.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        name: {"median": float(np.median(found)), "max": max(found), "instances": len(found)}
        for name, found in gaps.items()
    }


def _tell(done: int, total: int) -> None:
    """How many instances are done: one line on a terminal, elsewhere a line now and then."""
    if sys.stderr.isatty():
        print(f"placement: {done} of {total} instances", file=sys.stderr, end="\n" if done == total else "\r")
    elif done == total or done % max(1, total // 10) == 0:
        print(f"placement: {done} of {total} instances", file=sys.stderr)


def _plain(plan: Placement) -> dict[str, list[tuple[str, float]]]:
    return {
        version: [(holder.replica_id, holder.share) for holder in holders]
        for version, holders in plan.holders.items()
    }


def _moved(out: Path | None) -> tuple[float, dict[str, float]]:
    """The ratio, and the bytes of each policy; demand is drawn anew each epoch, by 300 requests a minute."""
    moved = dict.fromkeys((OURS, RIVAL), 0.0)
    for seed in range(SEEDS):
        for name in moved:
            moved[name] += _slid(name, seed) / SEEDS
    return moved[OURS] / moved[RIVAL] if moved[RIVAL] else float("nan"), moved


def _slid(name: str, seed: int) -> float:
    base = Instance(seed=seed, replicas=8, adapters=100, popularity="uniform", room=4.0).snapshot()
    rng = np.random.default_rng(seed)
    ranks = np.array([adapter.rank for adapter in base.adapters])
    whole = sum(base.demand_tokens_per_s.values())
    size = {adapter.version_id: adapter.size_bytes for adapter in base.adapters}
    current, bytes_ = Placement(), 0
    for epoch in range(EPOCHS):
        slid = epoch / (EPOCHS - 1)
        weights = 1 + 3 * (slid * (ranks == 8) + (1 - slid) * (ranks == 128))
        requests = rng.poisson(5000 * weights / weights.sum())
        demand = requests * whole / max(requests.sum(), 1)
        forecast = {
            adapter.version_id: float(one) for adapter, one in zip(base.adapters, demand, strict=True)
        }
        plan = POLICIES[name].plan(replace(base, current=current, demand_tokens_per_s=forecast))
        if epoch:
            bytes_ += sum(
                size[version] * len(plan.replicas_of(version) - current.replicas_of(version))
                for version in plan.holders
            )
        current = plan
    return float(bytes_)


if __name__ == "__main__":
    raise SystemExit(main())
