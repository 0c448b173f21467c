"""Measures how fast the simulator is: requests per second on one core, memory, and what size costs.

Four replicas of a shipped profile, 25 adapters of five ranks everywhere, a trace tiled to --requests at 0.8
of saturation, which is the rate at which these replicas complete what waits for them without end. The full
choice of the live router is made for each request, by load reports every 0.1 s that are seen 50 ms late.
Each figure is from a process of its own on one core, the metrics included: percentiles of TTFT and of
every gap between tokens, per rank.

  requests_per_s            requests over the wall time of simulating and judging, least-outstanding
  requests_per_s_phi        the same with weighted-share, which asks for no load
  peak_bytes                the most memory that the first of the two had
  cost_ratio_1000_replicas  CPU per request with 1,000 replicas and 10,000 adapters on 4 replicas each, over
                            that with 4 replicas and 25 adapters, at the same load per replica; no metrics
  fidelity                  with --fidelity: the worst error per figure against a live cluster of emulated
                            replicas, with --vllm of real vLLM too (`loraserve fidelity` says what each is)
  us_per_request            where the time goes: `model` is the replica models alone, given the same requests
                            on the same replicas without anybody looking, which is the floor; `cluster` is all
                            else of the simulation (routing, reports, events); `metrics` is the judging

Medians over --repeats.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import bench_common as common
import numpy as np
from simulator_fidelity import fidelity

from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import Sequence as ModelSequence
from loraserve.errors import LoraServeError
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.agenda import FAR_PS
from loraserve.simulator.figures import Judging, figures_of
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.workload import SimulatedWorkload

AZURE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv.gz"
PRESET = "preset:loraserve-uniform"
REPLICAS, ADAPTERS = 4, 25
MANY_REPLICAS, MANY_ADAPTERS, COPIES = 1000, 10_000, 4
LOAD = 0.8
REPORT_DELAY_S = 0.05
SATURATING_REQUESTS = 8_000
QUICK_REQUESTS = 50_000
SCALE_REQUESTS = 400_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is simulated: so many requests, at `rate_per_s` in all."""

    source: str
    profile: str
    requests: int
    rate_per_s: float | None
    replicas: int = REPLICAS
    adapters: int = ADAPTERS
    pool_adapters: int | None = None
    routing: str = "least-outstanding"

    def scenario(self) -> Scenario:
        """The scenario, drawn with seed 0."""
        workload = SimulatedWorkload(
            source=self.source,
            requests=self.requests,
            rate_per_s=self.rate_per_s,
            adapters=self.adapters,
            ranks="8,16,32,64,128",
        )
        options = ClusterOptions(
            num_replicas=self.replicas, routing=self.routing, pool_adapters=self.pool_adapters
        )
        made = scenario_of(find_simulatable(self.profile), workload.draw(0), options)
        return replace(made, report_delay_s=REPORT_DELAY_S, max_waiting=None)


def saturation(cluster: Cluster) -> float:
    """Requests per second that the replicas complete while others wait without end.

    Counted between the end of the first tenth and of the ninth, when every batch is full.
    """
    scenario = replace(cluster, requests=SATURATING_REQUESTS * cluster.replicas // REPLICAS).scenario()
    all_at_once = np.arange(len(scenario.trace), dtype=np.float64) * 1e-6
    waiting = replace(scenario.trace, arrival_s=all_at_once)
    end_ps = np.sort(simulate(replace(scenario, trace=waiting)).end_ps)
    first, last = len(end_ps) // 10, len(end_ps) * 9 // 10
    return float((last - first) / ((end_ps[last] - end_ps[first]) / 1e12))


def speed(cluster: Cluster) -> dict[str, float]:
    """How long one simulation takes, and where the time goes; to be called in a new process."""
    scenario = cluster.scenario()
    drawn_bytes = peak_bytes()
    begun_s = time.perf_counter()
    result = simulate(scenario)
    simulated_s = time.perf_counter()
    figures = figures_of(result, Judging())
    judged_s = time.perf_counter()
    assert figures.num_requests == cluster.requests
    most_bytes = peak_bytes()
    return {
        "wall_s": judged_s - begun_s,
        "simulate_s": simulated_s - begun_s,
        "metrics_s": judged_s - simulated_s,
        "model_s": models_alone_s(scenario, result),
        "peak_bytes": most_bytes,
        "workload_bytes": drawn_bytes,
    }


def cpu_per_request_s(cluster: Cluster) -> float:
    """CPU seconds per request of one simulation without metrics; to be called in a new process."""
    scenario = cluster.scenario()
    begun_s = time.process_time()
    simulate(scenario)
    return (time.process_time() - begun_s) / cluster.requests


def models_alone_s(scenario: Scenario, result: SimulationResult) -> float:
    """Seconds that the replica models take for the same requests on the same replicas."""
    gc.collect()
    begun_s = time.perf_counter()
    models = [ReplicaModel(setup.limits, setup.cost) for setup in scenario.replicas]
    for model in models:
        for adapter in scenario.adapters:
            model.hold(adapter.version_id, adapter.rank, adapter.size_bytes, 0)
    columns = (
        result.arrival_ps,
        result.replica,
        result.adapter,
        result.prompt_tokens,
        result.output_tokens,
    )
    for row, (at_ps, replica, place, prompt_tokens, output_tokens) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        version, model = scenario.adapters[place], models[replica]
        model.submit(
            ModelSequence(row, prompt_tokens, output_tokens, version.rank, version.version_id), at_ps
        )
        if row % 32 == 0:
            model.advance(at_ps)
            model.finished.clear()
    for model in models:
        model.advance(FAR_PS)
    return time.perf_counter() - begun_s


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(work: Callable[[], T]) -> T:
    """The work's answer, from a new process on one core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_keep_to_one_core) as pool:
        return pool.submit(work).result()


def _keep_to_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(base: Cluster, repeats: int, note: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    note(f"looking for the saturation of {REPLICAS} replicas")
    saturated = saturation(base)
    note(f"saturation is {saturated:.2f} requests/s, {LOAD} of it is offered")
    loaded = replace(base, rate_per_s=LOAD * saturated)
    runs: dict[str, list[dict[str, float]]] = {}
    for routing in ("least-outstanding", "weighted-share"):
        note(f"simulating {base.requests:,} requests, {routing}")
        runs[routing] = [alone(partial(speed, replace(loaded, routing=routing))) for _ in range(repeats)]
    full, phi = runs["least-outstanding"], runs["weighted-share"]

    def middle(rows: Sequence[dict[str, float]], key: str) -> float:
        return median(row[key] for row in rows)

    few = replace(loaded, requests=min(base.requests, SCALE_REQUESTS))
    many = replace(
        few,
        replicas=MANY_REPLICAS,
        adapters=MANY_ADAPTERS,
        pool_adapters=MANY_ADAPTERS * COPIES // MANY_REPLICAS,
        rate_per_s=LOAD * saturated * MANY_REPLICAS / REPLICAS,
    )
    note(f"simulating {few.requests:,} requests on {REPLICAS} and on {MANY_REPLICAS:,} replicas")
    costs = [[alone(partial(cpu_per_request_s, one)) for one in (few, many)] for _ in range(repeats)]
    us = {key: 1e6 / base.requests * middle(full, f"{key}_s") for key in ("simulate", "model", "metrics")}
    return {
        "requests_per_s": round(base.requests / middle(full, "wall_s")),
        "requests_per_s_phi": round(base.requests / middle(phi, "wall_s")),
        "peak_bytes": round(middle(full, "peak_bytes")),
        "cost_ratio_1000_replicas": round(median(large / small for small, large in costs), 2),
        "us_per_request": {
            "model": round(us["model"], 1),
            "cluster": round(us["simulate"] - us["model"], 1),
            "metrics": round(us["metrics"], 1),
        },
        "cpu_us_per_request": {
            f"{one.replicas} replicas": round(1e6 * median(row[place] for row in costs), 1)
            for place, one in enumerate((few, many))
        },
        "workload_bytes": round(middle(full, "workload_bytes")),
        "saturation_requests_per_s": round(saturated, 3),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = common.parser("simulator", __doc__, f"{QUICK_REQUESTS:,} requests, for a smoke test")
    parser.add_argument("--requests", type=common.at_least_one, default=1_000_000, metavar="N")
    parser.add_argument("--repeats", type=common.at_least_one, default=1, metavar="N")
    parser.add_argument(
        "--trace",
        default=str(AZURE) if AZURE.exists() else PRESET,
        metavar="FILE",
        help="a trace, or a preset (default: Azure's conversations if they are beside the checkout, else "
        f"{PRESET})",
    )
    parser.add_argument("--fidelity", action="store_true", help="compare with a live emulated cluster too")
    parser.add_argument("--vllm", action="store_true", help="and with real vLLM")
    parser.add_argument("--profile", default="a100-llama2-7b-bgmv", metavar="P", help="default: %(default)s")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    base = Cluster(
        source=options.trace,
        profile=options.profile,
        requests=min(options.requests, QUICK_REQUESTS) if options.quick else options.requests,
        rate_per_s=None,
    )

    def note(line: str) -> None:
        print(f"simulator: {line}", file=sys.stderr, flush=True)

    try:
        figures = measure(base, options.repeats, note)
        engines = ["emulated"] * options.fidelity + ["vllm"] * options.vllm
        figures["fidelity"] = fidelity(engines, quick=options.quick, note=note) or None
    except LoraServeError as error:
        note(str(error))
        return 2
    figures["conditions"] = common.conditions(
        "simulator", trace=Path(base.source).name, profile=base.profile, requests=base.requests
    )
    if options.json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
