"""What is compared: placement policies with their routing, workloads, fleets, and one run of each in the
simulator."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.experiments.contenders import CONTENDERS, Contender, contenders
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.figures import Judging, RunFigures, figures_of
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.workload import SimulatedWorkload
from placement.latency import StepCost
from placement.profile import Profile
from traces.columns import TraceColumns
from traces.metrics import GroupSummary, Slo

PROFILE = "a100-llama2-7b-bgmv-42"
RANKS = "8,16,32,64,128"
OURS, RIVAL, EVERYWHERE = "optimal", "loraserve", "least-loaded"
"""The contenders that the goals name."""
FROM_SCRATCH = "optimal-from-scratch"
"""Ours without hysteresis: no rival, but what shows what keeping to the present plan costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A named preset."""

    name: str
    preset: str


WORKLOADS = {
    one.name: one
    for one in (
        Workload(name="skew", preset="preset:loraserve-skew"),
        Workload(name="slide", preset="preset:loraserve-skewslide"),
        Workload(name="uniform", preset="preset:loraserve-uniform"),
    )
}
PLANNED = "_planned"
FLEETS = ("padded_batch", f"padded_config{PLANNED}", "padded_config", "sum")
"""What an adapter's rank costs in a step, see `placement.latency.RankKernel`; under `padded_config` every
replica is set to rank 128, or plans choose each one's setting, and replicas restart to it."""
VLLM_RANKS: Mapping[str, tuple[int, ...]] = {
    "vllm_mixed": (128, 16),
    "vllm_uniform": (128, 128),
    "vllm_rank_true": (128, 128),
}
"""Fleets of real replicas, by each one's `max_lora_rank`, see policies_vllm."""
VLLM_LENGTHS = (32.0, 24.0)
"""Mean tokens of a prompt and of an output there."""
_LENGTHS = (369.0, 106.0)
"""What a workload's requests have on average by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every contender. A replica's pool holds `pool_bytes`, 0: everything. Demand is
    measured over `window_s`, 0: an epoch. With a `speed` of 0.5 steps take twice as long, and the SLO gives
    twice the time. A replica that is started with another `max_lora_rank` is away for `restart_s`."""

    fleet: str = "padded_batch"
    profile: str = PROFILE
    replicas: int = 4
    adapters: int = 25
    duration_s: float = 600.0
    warmup_s: float = 120.0
    epoch_s: float = 60.0
    window_s: float = 0.0
    pool_bytes: int = 0
    routers: int = 1
    speed: float = 1.0
    restart_s: float = 60.0

    @property
    def kernel(self) -> str:
        """What ranks cost in a step; '' is what the profile says."""
        return "" if self.is_vllm else self.fleet.removesuffix(PLANNED)

    @property
    def is_vllm(self) -> bool:
        """Whether its replicas run vLLM."""
        return self.fleet in VLLM_RANKS

    @property
    def is_planned(self) -> bool:
        """Whether plans choose each replica's `max_lora_rank`."""
        return self.fleet.endswith(PLANNED)

    @property
    def is_arranged(self) -> bool:
        """Whether replicas are set otherwise than one another before a run, and stay so."""
        return len(set(VLLM_RANKS.get(self.fleet, ()))) > 1

    @property
    def lora_execution(self) -> str:
        """How vLLM computes adapters."""
        return "rank-true" if self.fleet == "vllm_rank_true" else "stock"

    @property
    def slo(self) -> Slo:
        """The targets at this speed."""
        if self.is_vllm:
            return Slo(ttft_ms=4000.0, tbt_ms=600.0)
        return Slo(ttft_ms=2000.0 / self.speed, tbt_ms=150.0 / self.speed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    contender: Contender
    workload: Workload
    rate_per_s: float
    seed: int
    setting: Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one run, warm-up excluded everywhere. `resident_bytes` is the mean over epochs of the
    adapters that all replicas hold; `in_slo`: TTFT p95 and TBT p95 are both within their targets."""

    fleet: str
    workload: str
    contender: str
    policy: str
    routing: str
    rate_per_s: float
    seed: int
    requests: int
    failed: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    tbt_p95_ms: float
    attainment: float
    in_slo: bool
    utilisation: float
    bytes_moved: int
    resident_bytes: float
    cold_misses: int


def available(names: Sequence[str] = ()) -> tuple[Contender, ...]:
    """The contenders asked for, or all; BadInputError lists those there are."""
    return contenders(names) if names else CONTENDERS


def fluid_rate_per_s(setting: Setting, workload: Workload) -> float:
    """Requests per second that would keep every replica exactly busy if ranks never met in a batch: an
    upper bound for fleets that pad a batch, used to lay out rates."""
    typical = replace(setting, duration_s=200.0)
    trace = requests(
        Case(contender=CONTENDERS[0], workload=workload, rate_per_s=10.0, seed=0, setting=typical)
    )
    profile = find_simulatable(setting.profile)
    ranks = [adapter.rank or 0 for adapter in trace.adapters]
    padded = setting.fleet == "padded_config"
    busy_s = sum(
        float(tokens) / profile.operating_point(profile.engine.max_lora_rank if padded else ranks[place])
        for place, tokens in zip(
            trace.adapter.tolist(), (trace.prompt_tokens + trace.output_tokens).tolist(), strict=True
        )
    )
    return setting.replicas * setting.speed * len(trace) / busy_s


@lru_cache(maxsize=4)
def draw(workload: Workload, rate_per_s: float, seed: int, duration_s: float, adapters: int) -> TraceColumns:
    """The requests of a workload, Poisson; the same for every contender."""
    return SimulatedWorkload(
        source=workload.preset,
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        adapters=adapters,
        ranks=RANKS,
    ).draw(seed)


def requests(case: Case) -> TraceColumns:
    """The requests of a run; short ones for real replicas."""
    setting = case.setting
    trace = draw(case.workload, case.rate_per_s, case.seed, setting.duration_s, setting.adapters)
    if not setting.is_vllm:
        return trace
    (prompt, output), (own_prompt, own_output) = VLLM_LENGTHS, _LENGTHS
    return replace(
        trace,
        prompt_tokens=_scaled(trace.prompt_tokens, prompt / own_prompt),
        output_tokens=_scaled(trace.output_tokens, output / own_output),
        hash_offsets=None,
        hash_ids=None,
    )


def _scaled(tokens: NDArray[np.int32], factor: float) -> NDArray[np.int32]:
    scaled: NDArray[np.int32] = np.maximum(1, np.rint(tokens * factor)).astype(np.int32)
    return scaled


def scenario(case: Case) -> Scenario:
    """What the simulator is to run."""
    setting = case.setting
    trace = requests(case)
    options = ClusterOptions(
        num_replicas=setting.replicas,
        policy=case.contender.policy,
        routing=case.contender.routing,
        kernel=_kernel(setting),
        num_routers=setting.routers,
        epoch_s=setting.epoch_s,
        window_s=setting.window_s or None,
        forecast=case.contender.forecast,
        speed=setting.speed,
        pool_bytes=setting.pool_bytes or None,
        max_lora_ranks="planned" if setting.is_planned else "fixed",
        restart_s=setting.restart_s,
        migration=case.contender.migration,
    )
    made = scenario_of(profile_of(setting), trace, options, seed=case.seed)
    return _as_set(made, VLLM_RANKS[setting.fleet]) if setting.is_vllm else made


def _as_set(made: Scenario, max_lora_ranks: Sequence[int]) -> Scenario:
    """With each replica's `max_lora_rank`; where steps are charged for it, with its cost."""
    (known,) = made.profiles.values()
    assert known.latency is not None, "it is simulated by it"
    replicas = tuple(
        replace(
            setup,
            spec=replace(setup.spec, max_lora_rank=rank),
            cost=StepCost.of(replace(known.latency, max_lora_rank=rank), 1.0),
        )
        for setup, rank in zip(made.replicas, max_lora_ranks, strict=True)
    )
    return replace(made, replicas=replicas)


def run_case(case: Case) -> Outcome:
    """Simulate and judge one run."""
    result = simulate(scenario(case))
    return outcome_of(case, figures_of(result, Judging(slo=case.setting.slo, warmup_s=case.setting.warmup_s)))


def outcome_of(case: Case, figures: RunFigures) -> Outcome:
    """The figures that are compared, of a simulation."""
    warmup_ps = round(case.setting.warmup_s * 1e12)
    epochs = [epoch for epoch in figures.epochs if epoch.time_ps > warmup_ps] or list(figures.epochs)
    return outcome_from(
        case,
        figures.summary.overall,
        utilisation=figures.utilisation,
        bytes_moved=sum(epoch.bytes_moved for epoch in epochs),
        resident_bytes=sum(epoch.resident_bytes for epoch in epochs) / max(1, len(epochs)),
        cold_misses=sum(epoch.cold_misses for epoch in epochs),
    )


def outcome_from(
    case: Case,
    overall: GroupSummary,
    *,
    bytes_moved: int,
    resident_bytes: float,
    utilisation: float = 0.0,
    cold_misses: int = 0,
) -> Outcome:
    """The figures that are compared, of a run that was summarised."""
    return Outcome(
        fleet=case.setting.fleet,
        workload=case.workload.name,
        contender=case.contender.name,
        policy=case.contender.policy,
        routing=case.contender.routing,
        rate_per_s=case.rate_per_s,
        seed=case.seed,
        requests=overall.requests,
        failed=overall.requests - overall.completed,
        ttft_p50_ms=_number(overall.ttft_ms.median),
        ttft_p95_ms=_number(overall.ttft_ms.p95),
        ttft_p99_ms=_number(overall.ttft_ms.p99),
        tbt_p95_ms=_number(overall.itl_ms.p95),
        attainment=overall.attainment or 0.0,
        in_slo=overall.slo_met,
        utilisation=utilisation,
        bytes_moved=bytes_moved,
        resident_bytes=resident_bytes,
        cold_misses=cold_misses,
    )


def case_tree(case: Case) -> dict[str, Any]:
    """A run in plain values, for `case_of`."""
    return asdict(case)


def case_of(tree: Mapping[str, Any]) -> Case:
    """What `case_tree` gave."""
    return Case(
        contender=Contender(**tree["contender"]),
        workload=Workload(**tree["workload"]),
        rate_per_s=tree["rate_per_s"],
        seed=tree["seed"],
        setting=Setting(**tree["setting"]),
    )


def _kernel(setting: Setting) -> str | None:
    own = profile_of(setting).latency
    return None if own is not None and setting.kernel in ("", own.kernel) else setting.kernel


def profile_of(setting: Setting) -> Profile:
    """The profile that was named."""
    return find_simulatable(setting.profile)


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def with_rate(case: Case, rate_per_s: float) -> Case:
    """The same at another rate."""
    return replace(case, rate_per_s=rate_per_s)


def plain(value: Any) -> Any:
    """The same for JSON: infinite figures as text, floats of six digits."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
