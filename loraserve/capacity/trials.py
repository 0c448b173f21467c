"""One trial: a policy on so many replicas with these settings, of one seed, simulated and judged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from loraserve.capacity.mixes import Mix
from loraserve.capacity.slo import figures_from
from loraserve.errors import BadInputError
from loraserve.experiments.contenders import Contender
from loraserve.simulator.crew import Tell
from loraserve.simulator.figures import Judging, figures_of
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.give_up import GaveUpError, GiveUp
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.what_if import WhatIf
from loraserve.simulator.workload import SimulatedWorkload
from placement.profile import Profile
from traces.columns import TraceColumns


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same in all trials. A run is given up once its 95th percentile of TTFT is certain to be
    above `give_up_ttft_ms`, None: never."""

    workload: SimulatedWorkload
    profile: Profile
    cluster: ClusterOptions
    judging: Judging
    give_up_ttft_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One simulation; an empty `what_if` is the workload as it is."""

    contender: Contender
    what_if: WhatIf
    mix: Mix
    seed: int

    @property
    def num_replicas(self) -> int:
        """How many there are."""
        return len(self.mix)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFigures:
    """What came of a trial; `figures` by the names of `slo.FIGURES`.

    One that was given up has none: its 95th percentile of TTFT is above `gave_up_ms`. Rates divide by the
    window of `traces.metrics`, tokens are prompt and output of completed requests.
    """

    figures: Mapping[str, float | None]
    requests: int = 0
    failed: int = 0
    tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    utilisation: float = 0.0
    gave_up_ms: float | None = None


def run_trial(setting: Setting, trial: Trial, tell: Tell) -> TrialFigures:
    """Simulate one; `tell` hears the trial, and how many of its requests of how many have come. BadInputError
    says what does not fit together."""
    judging = setting.judging
    give_up = None
    if setting.give_up_ttft_ms is not None:
        give_up = GiveUp(ttft_ms=setting.give_up_ttft_ms, warmup_s=judging.warmup_s)
    try:
        result = simulate(
            scenario_of_trial(setting, trial),
            on_progress=lambda done, total: tell((trial, done, total)),
            give_up=give_up,
        )
    except GaveUpError as error:
        tell((trial, 1, 1))
        return TrialFigures(figures={}, requests=error.num_judged, gave_up_ms=setting.give_up_ttft_ms)
    found = figures_of(result, judging)
    overall = found.summary.overall
    return TrialFigures(
        figures=figures_from(overall),
        requests=overall.requests,
        failed=overall.requests - overall.completed,
        tokens_per_s=overall.total_token_throughput,
        output_tokens_per_s=overall.output_throughput,
        utilisation=found.utilisation,
    )


def scenario_of_trial(setting: Setting, trial: Trial) -> Scenario:
    """What is simulated."""
    trace = drawn(setting.workload, trial.what_if, trial.seed)
    contender, number = trial.contender, trial.num_replicas
    options = replace(
        setting.cluster,
        num_replicas=number,
        replica_ranks=trial.mix,
        policy=contender.policy,
        routing=contender.routing,
        forecast=contender.forecast,
        migration=setting.cluster.migration if contender.migration == "off" else contender.migration,
        failures=trial.what_if.failures(number, trace.duration_s),
    )
    return scenario_of(setting.profile, trace, options, seed=trial.seed)


def label_of(trial: Trial) -> str:
    """What a person calls it."""
    what_if = "what if, " if trial.what_if else ""
    return f"{trial.contender.name}, {what_if}{trial.num_replicas} replicas, seed {trial.seed}"


@lru_cache(maxsize=16)
def drawn(workload: SimulatedWorkload, what_if: WhatIf, seed: int) -> TraceColumns:
    """The requests of a seed, kept, as every trial of it has the same; BadInputError."""
    trace = what_if.apply(workload.draw(seed), seed)
    if not len(trace):
        raise BadInputError(f"{workload.source}: no requests; expected at least one")
    return trace
