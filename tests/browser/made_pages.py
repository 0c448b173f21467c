"""Small pages of every kind that the project writes, from small real results."""

from pathlib import Path

from loraserve.capacity.prices import Price
from loraserve.capacity.report import write_report as write_capacity_report
from loraserve.capacity.slo import Target
from loraserve.capacity.solve import CapacityOptions, prepare, solve
from loraserve.capacity.trials import Setting
from loraserve.experiments.contenders import contenders
from loraserve.experiments.jobs import jobs_of_experiment
from loraserve.experiments.measure import measure
from loraserve.experiments.report.write import write_report as write_experiment_report
from loraserve.experiments.results import ExperimentResult
from loraserve.experiments.spec import parse_experiment
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.figures import Judging, figures_of
from loraserve.simulator.from_profile import ClusterOptions
from loraserve.simulator.report import write_comparison
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.what_if import WhatIf
from loraserve.simulator.workload import SimulatedWorkload
from tests.support.simulated import poisson_trace, replicas_of, scenario_of
from traces import Outcome, RequestRecord, bundled_trace, schedule, summarise
from traces.report import write_report as write_replay_report

NASTY = "<script>console.error('escaped')</script> & \"quotes\""
EXPERIMENT = {
    "title": f"A small experiment {NASTY}",
    "summary": "Two policies on two workloads.",
    "traces": [
        {"name": "uniform", "source": "preset:loraserve-uniform"},
        {"name": "skew", "source": "preset:loraserve-skew", "note": NASTY},
    ],
    "policies": ["optimal", "loraserve", "slora-random"],
    "replicas": [2],
    "rates": ["0.5x", "0.8x"],
    "kernels": ["sum"],
    "cluster": {"duration_s": 12, "warmup_s": 3, "epoch_s": 3},
    "find": {"fewest_replicas_at": [9.0], "most_replicas": 3},
    "claims": [
        {
            "text": "up to nine times lower TTFT p95",
            "figure": "ttft_p95_ms",
            "policy": "loraserve",
            "over": "slora-random",
            "paper": 9.0,
            "why": NASTY,
        }
    ],
    "published": [{"name": "a line", "figure": "ttft_p95_ms", "points": [[5, 200], [12, 900]]}],
}


def experiment_report(folder: Path) -> Path:
    """The report of an experiment."""
    experiment = parse_experiment(EXPERIMENT)
    found = tuple(measure(job) for job in jobs_of_experiment(experiment, folder))
    result = ExperimentResult(name="small", experiment=experiment, jobs=found)
    return write_experiment_report(result, folder, command=f"loraserve simulate small.toml {NASTY}")


def replay_report(folder: Path) -> Path:
    """The report of a replay."""
    records = []
    for due_s, request in schedule(bundled_trace("demo")):
        rank = request.rank or 0
        times_s = tuple(due_s + 0.05 + 0.002 * rank + 0.03 * at for at in range(request.output_tokens))
        records.append(
            RequestRecord(
                index=request.index,
                request_id=f"demo-{request.index}",
                adapter=request.adapter,
                rank=request.rank,
                scheduled_s=due_s,
                sent_s=due_s,
                end_s=times_s[-1] if times_s else due_s,
                prompt_tokens=request.prompt_tokens,
                output_tokens=len(times_s),
                expected_output_tokens=request.output_tokens,
                outcome=Outcome.OK,
                status="",
                message_times_s=times_s,
                message_tokens=(1,) * len(times_s),
                warmup=due_s < 5,
            )
        )
    paths = write_replay_report(
        folder,
        records,
        summarise(records),
        title=NASTY,
        command="loraserve replay",
        environment={"CPU": NASTY},
    )
    return paths[-1]


def simulation_report(folder: Path) -> Path:
    """The page of `loraserve simulate --out`."""
    folder.mkdir(parents=True)
    runs = {}
    for policy in ("least-loaded", "slora-random"):
        scenario: Scenario = scenario_of(poisson_trace(200, 10.0), replicas_of(2), policy=policy)
        runs[policy] = figures_of(simulate(scenario), Judging())
    names = {label: label for label in runs}
    return write_comparison(
        folder, runs, names, title=NASTY, command="loraserve simulate demo", workload={"trace": NASTY}
    )


def capacity_report(folder: Path) -> Path:
    """The report of a search for capacity."""
    options = CapacityOptions(
        setting=Setting(
            workload=SimulatedWorkload(
                source="preset:loraserve-skew", rate_per_s=12.0, duration_s=12.0, adapters=5
            ),
            profile=find_simulatable("a100-llama2-7b-bgmv-42"),
            cluster=ClusterOptions(epoch_s=4.0),
            judging=Judging(),
        ),
        target=Target.parse("ttft_p95<1s,tbt_p95<100ms"),
        contenders=contenders(["optimal", "slora-random"]),
        seeds=(0, 1),
        most=6,
        what_if=WhatIf.parse(add=["2x64"]),
        price=Price(per_gpu_hour=2.5, gpus_per_replica=1),
        has_curve=True,
        jobs=1,
    )
    folder.mkdir()
    return write_capacity_report(folder, solve(prepare(options)), command=f"loraserve capacity {NASTY}")
