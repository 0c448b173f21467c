"""How much of the adapters each replica holds, in the simulator: what the fabric makes possible.

Ours and LoRAServe's algorithm place each adapter where it is used; against that every adapter on every
replica. The workloads are LoRAServe's, at a rate that all three hold.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from policies_cases import (
    EVERYWHERE,
    OURS,
    RIVAL,
    WORKLOADS,
    Case,
    Outcome,
    Setting,
    available,
    fluid_rate_per_s,
    run_case,
)
from policies_runs import Runner

FLEETS = ((25, 4), (25, 12), (100, 4), (100, 12))
"""Adapters and replicas."""
OF_FLUID = 0.6
"""The rate, of what would keep every replica exactly busy."""
COPIES = 2
"""Of every adapter, that all pools together have room for in the tight runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentOptions:
    """How long is simulated, and which workloads."""

    workloads: tuple[str, ...] = ("skew", "slide", "uniform")
    fleets: tuple[tuple[int, int], ...] = FLEETS
    duration_s: float = 300.0
    warmup_s: float = 120.0


def measure_resident(options: ResidentOptions, runner: Runner) -> dict[str, Any]:
    """`resident_bytes` by fleet and contender: per replica, the share of every adapter everywhere, and the
    attainment; means over the workloads, whose runs come with it.

    First with room for everything in every replica, then, under `..._room_for_2`, with pools that together
    hold every adapter twice.
    """
    settings = [
        Setting(
            adapters=adapters,
            replicas=replicas,
            duration_s=options.duration_s,
            warmup_s=options.warmup_s,
        )
        for adapters, replicas in options.fleets
    ]
    roomy = _ran(options, settings, (OURS, RIVAL, EVERYWHERE), runner)
    everywhere = {
        setting: mean(one.resident_bytes for case, one in roomy if _is_of(case, setting, EVERYWHERE))
        / setting.replicas
        for setting in settings
    }
    tight = {
        replace(setting, pool_bytes=math.ceil(COPIES * all_bytes / setting.replicas)): setting
        for setting, all_bytes in everywhere.items()
    }
    ran = [*roomy, *_ran(options, list(tight), (OURS, RIVAL), runner)]
    fleets: dict[str, Any] = {}
    for setting in (*settings, *tight):
        fleet = fleets.setdefault(f"{setting.adapters}_adapters_{setting.replicas}_replicas", {})
        all_bytes = everywhere[tight.get(setting, setting)]
        for name in (OURS, RIVAL, EVERYWHERE):
            own = [outcome for case, outcome in ran if _is_of(case, setting, name)]
            if own:
                fleet[name + (f"_room_for_{COPIES}" if setting.pool_bytes else "")] = _told(
                    own, setting.replicas, all_bytes
                )
    return {
        "resident_bytes": fleets,
        "resident_bytes_of_fluid_rate": OF_FLUID,
        "resident_bytes_simulated_s": options.duration_s,
        "resident_bytes_runs": [
            {
                "adapters": case.setting.adapters,
                "replicas": case.setting.replicas,
                "pool_bytes": case.setting.pool_bytes,
                **asdict(outcome),
            }
            for case, outcome in ran
        ],
    }


def _ran(
    options: ResidentOptions, settings: Sequence[Setting], names: Sequence[str], runner: Runner
) -> list[tuple[Case, Outcome]]:
    cases = [
        Case(
            contender=contender,
            workload=WORKLOADS[name],
            rate_per_s=OF_FLUID * fluid_rate_per_s(setting, WORKLOADS[name]),
            seed=0,
            setting=setting,
        )
        for setting in settings
        for name in options.workloads
        for contender in available(names)
    ]
    return list(zip(cases, runner.all("resident_bytes", run_case, cases), strict=True))


def _is_of(case: Case, setting: Setting, contender: str) -> bool:
    return case.setting == setting and case.contender.name == contender


def _told(own: Sequence[Outcome], replicas: int, everywhere_bytes: float) -> dict[str, float]:
    per_replica = mean(one.resident_bytes for one in own) / replicas
    return {
        "bytes_per_replica": round(per_replica),
        "share_of_everywhere": round(per_replica / everywhere_bytes, 4),
        "copies": round(per_replica * replicas / everywhere_bytes, 2),
        "attainment": round(mean(one.attainment for one in own), 4),
        "worst_attainment": round(min(one.attainment for one in own), 4),
        "cold_misses": sum(one.cold_misses for one in own),
        "requests": sum(one.requests for one in own),
    }
