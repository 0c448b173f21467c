"""`python policies_live_run.py SPEC`: one live run in a process of its own, started by policies_live.

Starts a cluster with the contender's placement, routing and forecast, registers the adapters, waits until all
runs of its round are as far, sends the requests at their times, and ends the cluster. Bytes are seen by
asking the cluster twice a second what its replicas hold: a copy that comes and goes in between is not seen.
They are counted as those of the simulated adapters, by rank, so that both sides can be compared.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import bench_common as common
import policies_cases as cases
import policies_live_config as configs
import policies_vllm as vllm
from policies_cases import Case

from loraserve.client import Client
from loraserve.cluster.processes import processes_of
from loraserve.cluster.state import RunningCluster
from loraserve.errors import LoraServeError
from loraserve.fidelity.live import LiveCluster, LiveRun
from loraserve.fidelity.processors import OTHERS
from loraserve.fidelity.steps import step_factors
from placement.latency import LatencyModel
from traces.metrics import summarise

LOOK_EVERY_S = 0.5
GATE_POLL_S = 0.05
GATE_TIMEOUT_S = 300.0
SETTLE_S = 1.0


@dataclass(slots=True)
class Seen:
    """What replicas were seen to hold and how they were set over a run; bytes after its warm-up."""

    bytes_per_rank: float
    sizes: dict[str, float] = field(default_factory=dict)
    bytes_moved: float = 0.0
    resident_bytes: list[float] = field(default_factory=list)
    settings: list[tuple[int, ...]] = field(default_factory=list)
    before: dict[str, frozenset[str]] = field(default_factory=dict)

    async def watch(self, addresses: Sequence[str], warmup_s: float) -> None:
        """Look again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with Client(addresses) as client:
            while True:
                with contextlib.suppress(LoraServeError):
                    await self._look(client, counts=loop.time() - began_s >= warmup_s)
                await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, client: Client, *, counts: bool) -> None:
        status = await client.status()
        self.sizes |= {one.version: one.rank * self.bytes_per_rank for one in status.adapters}
        # What a replica holds that is away is not known, and what it comes back with was loaded anew.
        held = {one.replica_id: frozenset(one.resident) for one in status.replicas}
        settings = tuple(one.max_lora_rank for one in status.replicas)
        if all(settings) and settings not in self.settings[-1:]:
            self.settings.append(settings)
        if counts:
            self.resident_bytes.append(sum(self.sizes.get(one, 0) for own in held.values() for one in own))
            self.bytes_moved += sum(
                self.sizes.get(one, 0)
                for replica, own in held.items()
                for one in own - self.before.get(replica, own)
            )
        self.before = held


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What the process that starts a run tells it. `arrived` is made when the run can begin, and it begins
    when `go` is there; `result` is written whole when it has ended."""

    case: Case
    model: Path
    adapters: Mapping[str, Path]
    arrived: Path
    go: Path
    result: Path

    @classmethod
    def read(cls, path: Path) -> "Spec":
        """What `write` wrote."""
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            case=cases.case_of(tree["case"]),
            model=Path(tree["model"]),
            adapters={name: Path(folder) for name, folder in tree["adapters"].items()},
            arrived=Path(tree["arrived"]),
            go=Path(tree["go"]),
            result=Path(tree["result"]),
        )

    def write(self, path: Path) -> None:
        """For `read`."""
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")


async def measure(spec: Spec, folder: Path) -> dict[str, Any]:
    """The run, from the cluster's start to its end."""
    case, setting = spec.case, spec.case.setting
    trace = cases.requests(case)
    if setting.is_vllm:
        vllm.use_one_thread()
    config = configs.config_of(case, spec.model, spec.adapters, folder)
    began_s = time.monotonic()
    with common.cluster("policies", config) as (running, _):
        if setting.is_arranged:
            await vllm.arrange(running.router_addresses, cases.VLLM_RANKS[setting.fleet])
        cluster = _live_cluster(running, case)
        await cluster.register({one.name: spec.adapters[one.name] for one in trace.adapters})
        if setting.is_vllm:
            vllm.yield_processors(running.run_id)
        _pass_gate(spec)
        ready_s = time.monotonic()
        seen = Seen(bytes_per_rank=cases.profile_of(setting).adapter_bytes_per_rank)
        watching = asyncio.create_task(seen.watch(running.router_addresses, setting.warmup_s))
        done = await cluster.run(trace)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        ended_s = time.monotonic()
    told = _told(case, done, seen)
    return told | {"start_s": ready_s - began_s, "run_s": ended_s - ready_s}


def _live_cluster(running: RunningCluster, case: Case) -> LiveCluster:
    return LiveCluster(
        running.router_addresses,
        lambda: {"cluster": processes_of(running.run_id)},
        look_aside=False,
        max_others=1.0,
        seed=case.seed,
    )


def _pass_gate(spec: Spec) -> None:
    """Wait, with nothing else to do, for the other runs of the round; after a while begin without them."""
    spec.arrived.touch()
    until_s = time.monotonic() + GATE_TIMEOUT_S
    while not spec.go.exists() and time.monotonic() < until_s:
        time.sleep(GATE_POLL_S)
    time.sleep(SETTLE_S)


def _told(case: Case, done: LiveRun, seen: Seen) -> dict[str, Any]:
    setting = case.setting
    records = [replace(one, warmup=one.scheduled_s < setting.warmup_s) for one in done.records]
    summary = summarise(records, slo=setting.slo)
    outcome = cases.outcome_from(
        case,
        summary.overall,
        bytes_moved=round(seen.bytes_moved),
        resident_bytes=mean(seen.resident_bytes) if seen.resident_bytes else 0.0,
    )
    model = _model(case)
    return {
        "outcome": asdict(outcome),
        "pacing_p99_ms": summary.pacing.p99_ms if summary.pacing else 0.0,
        "busy": done.processors.total,
        "others": done.processors.busy.get(OTHERS, 0.0) / done.processors.processors,
        "step_factor": None if model is None else step_factors(records, model).decode,
        "settings": seen.settings,
    }


def _model(case: Case) -> LatencyModel | None:
    """What steps take by the model; None where it is another one on each replica."""
    (known,) = cases.scenario(case).profiles.values()
    return None if case.setting.is_planned or case.setting.is_arranged else known.latency


def main() -> None:
    """Run what the file says, and write what came of it."""
    common.end_in_order_when_told()
    spec = Spec.read(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="loraserve-policies-") as folder:
        told = asyncio.run(measure(spec, Path(folder)))
    whole = spec.result.with_suffix(".part")
    whole.write_text(json.dumps({"case": cases.case_tree(spec.case), **told}), encoding="utf-8")
    os.replace(whole, spec.result)


if __name__ == "__main__":
    main()
