"""What `loraserve simulate` simulates: the runs behind its options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from loraserve.errors import BadInputError
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.figures import Judging, RunFigures
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.sweep import SweepRun, sweep
from loraserve.simulator.what_if import WhatIf
from loraserve.simulator.workload import SimulatedWorkload
from placement.policies import POLICIES
from placement.routing.chooser import ROUTING_POLICIES
from placement.routing.pairing import AUTO, routing_for
from traces.columns import TraceColumns

MAX_RUNS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """Every policy with every routing and every seed is one run, the routing "auto" being what goes with
    the policy; `ray_address` None is this machine."""

    workload: SimulatedWorkload
    cluster: ClusterOptions
    judging: Judging
    profile: str
    policies: tuple[str, ...]
    routings: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int | None = None
    ray_address: str | None = None
    what_if: WhatIf = field(default_factory=WhatIf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The runs by their labels, and the folder of each."""

    scenarios: Mapping[str, Scenario]
    folders: Mapping[str, str]

    @property
    def num_requests(self) -> tuple[int, ...]:
        """The requests of each run."""
        return tuple(len(scenario.trace) for scenario in self.scenarios.values())


def prepare(options: SimulateOptions) -> Plan:
    """Read and check everything before anything is simulated; BadInputError says what is wrong."""
    _check(options.policies, POLICIES, "--policy")
    _check(options.routings, {AUTO: None, **ROUTING_POLICIES}, "--routing")
    count = len(options.policies) * len(options.routings) * len(options.seeds)
    if count > MAX_RUNS:
        raise BadInputError(f"--policy, --routing, --seeds: {count} runs; expected {MAX_RUNS} at most")
    profile = find_simulatable(options.profile)
    traces = _traces(options)
    for trace in traces.values():
        if len(trace) and trace.arrival_s[-1] < options.judging.warmup_s:
            last = f"the last request comes at {trace.arrival_s[-1]:g} s"
            raise BadInputError(f"--warmup: {options.judging.warmup_s:g} s leaves nothing, {last}")
    scenarios, folders = {}, {}
    for policy, routing, seed in product(options.policies, options.routings, options.seeds):
        lost = options.what_if.failures(options.cluster.num_replicas, traces[seed].duration_s)
        cluster = replace(
            options.cluster,
            policy=policy,
            routing=routing_for(policy, routing),
            failures=(*options.cluster.failures, *lost),
        )
        label, folder = policy, policy
        if len(options.routings) > 1:
            label, folder = f"{label} / {routing}", f"{folder}-{routing}"
        if len(options.seeds) > 1:
            label = f"{label}, seed {seed}"
        scenarios[label] = scenario_of(profile, traces[seed], cluster, seed=seed)
        folders[label] = f"{folder}-seed-{seed}"
    return Plan(scenarios=scenarios, folders=folders)


def _traces(options: SimulateOptions) -> dict[int, TraceColumns]:
    """The workload of each seed, drawn once where no seed decides anything in it."""
    workload, what_if = options.workload, options.what_if
    first = what_if.apply(workload.draw(options.seeds[0]), options.seeds[0])
    is_drawn = workload.is_drawn or what_if.is_drawn
    return {
        seed: what_if.apply(workload.draw(seed), seed) if place and is_drawn else first
        for place, seed in enumerate(options.seeds)
    }


def simulate_all(
    plan: Plan,
    options: SimulateOptions,
    stage: Path | None,
    on_progress: Callable[[int, int, int], None],
) -> dict[str, RunFigures]:
    """The figures of every run by its label; files go into folders of `stage`, if there is one."""
    runs = [
        SweepRun(scenario=scenario, folder=None if stage is None else stage / plan.folders[label])
        for label, scenario in plan.scenarios.items()
    ]
    if options.ray_address is None:
        figures = sweep(runs, options.judging, jobs=options.jobs, on_progress=on_progress)
    else:
        from loraserve.cluster.ray_sweep import ray_sweep

        totals = plan.num_requests
        figures = ray_sweep(
            runs,
            options.judging,
            options.ray_address,
            on_done=lambda place: on_progress(place, totals[place], totals[place]),
        )
    return dict(zip(plan.scenarios, figures, strict=True))


def _check(names: tuple[str, ...], known: Mapping[str, object], option: str) -> None:
    for name in names:
        if name not in known:
            raise BadInputError(f"{option}: {name!r} is unknown; known: {', '.join(sorted(known))}")
