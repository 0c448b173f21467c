"""Remakes LoRAServe's evaluation in the simulator, and prints what of its claims comes out.

Runs the experiments that ship as loraserve-4 (25 adapters on 4 replicas) and loraserve-12 (100 on 12): all of
its workloads, ten policies with the routing and forecast that belong to each, three ways in which ranks cost,
three seeds. `loraserve simulate experiment:loraserve-4` makes the same with a report to look at.

  loraserve_vs_random, optimal_vs_loraserve   per workload how many times better the first is, medians of the
             seeds: throughput (highest rate inside the SLO), ttft_p95 (at 0.85 of the rate at which all
             replicas would be busy if ranks never met in a batch), replicas (fewest inside the SLO at the
             rate of the experiment); 4 replicas, batches padded to their highest rank. null: there is none,
             and the note says why; at_least: the other was never inside, so what it failed at is compared
  cases      the same for every number of replicas, kernel and rate, with the least and the most of the seeds
  optimal_behind   where another policy is better than `optimal` with some seed: a highest rate above by more
             than 3 %, the tolerance of the search; a TTFT p95 lower by more than 5 %; fewer replicas.
             times_the_tolerance is 1 there, for each seed; for_every_seed tells what is no lot of the draw
  wall_s     how long all of it took, 0.0 for what was there from an earlier run of the same code in --out

Goal: under 900 s on 2 cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bench_common as common
import msgspec

from loraserve.cli.experiment import JobProgress
from loraserve.errors import LoraServeError
from loraserve.experiments.jobs import jobs_of_experiment
from loraserve.experiments.report.aggregate import aggregate
from loraserve.experiments.report.claims import ClaimCase, claims_found
from loraserve.experiments.results import ExperimentResult, JobResult
from loraserve.experiments.run import run_experiment, write_results
from loraserve.experiments.spec import ClaimSection, Experiment, find_experiment, read_experiment

NAMES = ("loraserve-4", "loraserve-12")
PAIRS = {
    "loraserve_vs_random": ("loraserve", "slora-random"),
    "optimal_vs_loraserve": ("optimal", "loraserve"),
}
FIGURES = {"throughput": "highest_rate", "ttft_p95": "ttft_p95_ms", "replicas": "fewest_replicas"}
HEADLINE_KERNEL, HEADLINE_RATE = "padded_batch", "0.85x"
OURS = "optimal"
RATE_TOLERANCE, LATENCY_TOLERANCE = 0.03, 0.05


def run(name: str, out: Path, jobs: int | None, *, quick: bool) -> tuple[ExperimentResult, float]:
    """One experiment and how long it took."""
    _, path = find_experiment(f"experiment:{name}")
    experiment = read_experiment(path)
    if quick:
        cluster = msgspec.structs.replace(experiment.cluster, duration_s=30.0, warmup_s=6.0, epoch_s=5.0)
        experiment = msgspec.structs.replace(
            experiment,
            traces=experiment.traces[:2],
            seeds=[0],
            cluster=cluster,
            kernels=experiment.kernels[:1],
        )
    folder = out / name
    begun_s = time.monotonic()
    with JobProgress() as progress:
        progress.say(name)
        result = run_experiment(
            name,
            experiment,
            jobs_of_experiment(experiment, path.parent),
            folder,
            processes=jobs,
            progress=progress.told,
        )
    wall_s = time.monotonic() - begun_s
    write_results(result, folder)
    return result, wall_s


def cases(result: ExperimentResult) -> Iterator[dict[str, Any]]:
    """What of each pair comes out, everywhere."""
    claims = [
        ClaimSection(text=f"{pair}/{name}", figure=figure, policy=policy, over=over)  # type: ignore[arg-type]
        for pair, (policy, over) in PAIRS.items()
        for name, figure in FIGURES.items()
    ]
    asked: Experiment = msgspec.structs.replace(result.experiment, claims=claims)
    for found in claims_found(aggregate(msgspec.structs.replace(result, experiment=asked))):
        pair, _, figure = found.claim.text.partition("/")
        for case in found.cases:
            yield {"experiment": result.name, "pair": pair, "figure": figure, **_case_tree(case)}


def _case_tree(case: ClaimCase) -> dict[str, Any]:
    value = case.value
    return {
        "workload": case.trace,
        "replicas": case.setting.replicas,
        "kernel": case.setting.kernel,
        "rate": case.rate,
        "ratio": None if value is None else value.median,
        "least": None if value is None else value.lowest,
        "most": None if value is None else value.highest,
        "at_least": case.is_bound,
        "note": case.note,
    }


def headline(found: Sequence[dict[str, Any]], pair: str) -> dict[str, dict[str, Any]]:
    """Per figure and workload, for the experiment, the kernel and the rate that the goals are about."""
    chosen = [
        case
        for case in found
        if case["pair"] == pair
        and case["experiment"] == NAMES[0]
        and case["kernel"] == HEADLINE_KERNEL
        and (case["figure"] != "ttft_p95" or case["rate"].startswith(HEADLINE_RATE))
    ]
    return {
        figure: {
            case["workload"]: {"ratio": case["ratio"], "at_least": case["at_least"], "note": case["note"]}
            for case in chosen
            if case["figure"] == figure
        }
        for figure in FIGURES
    }


def optimal_behind(result: ExperimentResult) -> Iterator[dict[str, Any]]:
    """Where another policy is better than ours with some seed, beyond the tolerance."""
    jobs = {
        (job.trace, job.kernel, job.profile, job.replicas, job.policy, job.seed): job for job in result.jobs
    }
    seeds = result.experiment.seeds
    for trace, kernel, profile, replicas, policy in dict.fromkeys(key[:5] for key in jobs):
        if policy in (OURS, f"{OURS}-from-scratch"):
            continue
        pairs = [
            (
                jobs[trace, kernel, profile, replicas, OURS, seed],
                jobs[trace, kernel, profile, replicas, policy, seed],
            )
            for seed in seeds
        ]
        for figure, rate, ratios in _comparisons(pairs):
            if any(ratio > 1 for ratio in ratios):
                yield {
                    "experiment": result.name,
                    "workload": trace,
                    "kernel": kernel,
                    "replicas": replicas,
                    "policy": policy,
                    "figure": figure,
                    "rate": rate,
                    "times_the_tolerance": dict(zip(map(str, seeds), ratios, strict=True)),
                    "for_every_seed": all(ratio > 1 for ratio in ratios),
                }


def _comparisons(
    pairs: Sequence[tuple[JobResult, JobResult]],
) -> Iterator[tuple[str, str, list[float]]]:
    """By figure and rate, for each seed how far ours is behind, 1 being all of the tolerance."""
    if all(ours.highest and theirs.highest for ours, theirs in pairs):
        yield (
            "throughput",
            "",
            [
                theirs.highest.held_per_s / max(ours.highest.held_per_s, 1e-9) / (1 + RATE_TOLERANCE)
                for ours, theirs in pairs
                if ours.highest and theirs.highest
            ],
        )
    for place, fewest in enumerate(pairs[0][0].fewest):
        found = [(ours.fewest[place].replicas, theirs.fewest[place].replicas) for ours, theirs in pairs]
        ratios = [(ours or 1e9) / theirs if theirs else 0.0 for ours, theirs in found]
        yield "replicas", fewest.asked, ratios
    for place, point in enumerate(pairs[0][0].points):
        latencies = [
            (ours.points[place].ttft_p95_ms, theirs.points[place].ttft_p95_ms) for ours, theirs in pairs
        ]
        ratios = [
            (ours if ours is not None else 1e12) / theirs / (1 + LATENCY_TOLERANCE) if theirs else 0.0
            for ours, theirs in latencies
        ]
        yield "ttft_p95", point.asked, ratios


def main() -> int:
    """Run both, print."""
    parser = common.parser("experiments", __doc__, "two workloads of half a minute, one kernel, one seed")
    parser.add_argument("--out", type=Path, help="keep results here, and go on with those that are there")
    parser.add_argument("--only", choices=NAMES, help="one of the two")
    parser.add_argument("--jobs", type=common.at_least_one, help="processes [default: one per core]")
    options = parser.parse_args()
    common.end_in_order_when_told()
    place = nullcontext(str(options.out)) if options.out else tempfile.TemporaryDirectory()
    wall_s: dict[str, float] = {}
    found: list[dict[str, Any]] = []
    behind: list[dict[str, Any]] = []
    with place as folder:
        for name in [options.only] if options.only else NAMES:
            result, wall_s[name] = run(name, Path(folder), options.jobs, quick=options.quick)
            found += cases(result)
            behind += optimal_behind(result)
    report = {
        "conditions": common.conditions("experiments"),
        **{pair: headline(found, pair) for pair in PAIRS},
        "optimal_behind": behind,
        "wall_s": sum(wall_s.values()),
        "wall_s_of": wall_s,
        "cases": found,
    }
    print_report(report)
    if options.json:
        print(json.dumps(report, allow_nan=False))
    return 0


def print_report(report: dict[str, Any]) -> None:
    """The headline for people, on stderr where JSON goes to stdout."""
    for pair in PAIRS:
        print(
            f"\n{pair.replace('_', ' ')}: 4 replicas, batches padded to their highest rank", file=sys.stderr
        )
        for figure, by_workload in report[pair].items():
            cells = ", ".join(f"{workload} {_cell(case)}" for workload, case in by_workload.items())
            print(f"  {figure}: {cells}", file=sys.stderr)
    behind = report["optimal_behind"]
    always = sum(one["for_every_seed"] for one in behind)
    print(f"\noptimal behind another: {len(behind)} cases, {always} of them for every seed", file=sys.stderr)
    for one in behind:
        where = f"{one['experiment']}, {one['workload']}, {one['kernel']}, {one['figure']} {one['rate']}"
        ratios = ", ".join(f"{ratio:.3f}" for ratio in one["times_the_tolerance"].values())
        print(f"  {where}: {one['policy']} ({ratios} of the tolerance)", file=sys.stderr)
    print(f"wall: {report['wall_s']:.0f} s", file=sys.stderr)


def _cell(case: dict[str, Any]) -> str:
    if case["ratio"] is None:
        return case["note"] or "-"
    return f"{'at least ' if case['at_least'] else ''}{case['ratio']:.2f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoraServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
