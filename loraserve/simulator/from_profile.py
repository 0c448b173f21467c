"""A scenario from a profile: replicas that are all of the kind that was measured."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import BadInputError
from loraserve.simulator.links import LinkSpeed
from loraserve.simulator.scenario import Failure, ReplicaSetup, Scenario, versions_of
from placement.demand import DEFAULT_FORECASTER
from placement.latency import COEFFICIENTS, LatencyModel, RankKernel, StepCost
from placement.profile import Profile
from placement.steady_load import SteadyLoad, steady_tokens_per_s
from placement.types import ReplicaId, ReplicaSpec
from traces.columns import TraceColumns

MAX_REPLICAS = 100_000
HISTORY_EPOCHS = 5
"""LoRAServe's own: five windows of a minute each."""

_ENDLESS = 2**62
_FAILURE = re.compile(
    r"(?P<replica>\S+)@(?P<at>[0-9.]+)s?\s+for\s+(?P<down>[0-9.]+)s?", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """The cluster around the profile's replicas, see `Scenario`.

    Demand is measured over `window_s`, None: an epoch. A replica's host pool holds at most `pool_adapters`
    and `pool_bytes`, None: no limit. `kernel` charges ranks otherwise than the profile's; `speed` 2 halves
    every step. Peers copy from each other at the profile's speed unless `from_origin_only`. `replica_ranks`
    are the replicas' own `max_lora_rank`, one each, None: the profile's; where the kernel is padded_config,
    each replica's steps cost by its own.
    """

    num_replicas: int = 4
    policy: str = "least-loaded"
    routing: str = "least-outstanding"
    kernel: str | None = None
    speed: float = 1.0
    num_routers: int = 1
    epoch_s: float = 60.0
    window_s: float | None = None
    forecast: str = DEFAULT_FORECASTER
    report_interval_s: float = 0.1
    network_delay_s: float = 0.0005
    max_waiting: int = 256
    pool_adapters: int | None = None
    pool_bytes: int | None = None
    on_demand: bool = False
    from_origin_only: bool = False
    failures: tuple[Failure, ...] = ()
    max_lora_ranks: str = "fixed"
    restart_s: float = 60.0
    migration: str = "off"
    replica_ranks: tuple[int, ...] | None = None


def scenario_of(
    profile: Profile, trace: TraceColumns, options: ClusterOptions | None = None, *, seed: int = 0
) -> Scenario:
    """The profile's replicas under this workload; BadInputError says what does not fit together."""
    options = options or ClusterOptions()
    if not 1 <= options.num_replicas <= MAX_REPLICAS:
        raise BadInputError(f"--replicas: {options.num_replicas}; expected from 1 to {MAX_REPLICAS}")
    ranks = options.replica_ranks or (profile.engine.max_lora_rank,) * options.num_replicas
    _check_ranks(profile, trace, options, ranks)
    if options.max_lora_ranks != "fixed" and not profile.operating_points:
        raise BadInputError(
            f"--max-lora-ranks {options.max_lora_ranks}: profile {profile.name} has no operating points to"
            " choose by; give another with --profile"
        )
    try:
        cost = _cost(profile, options)
        known = _known(profile, options, trace)
        limits = _limits(profile, trace, options)
        origin = LinkSpeed(bytes_per_s=profile.speeds.origin_bytes_per_s, latency_s=0.01)
        peer = LinkSpeed(bytes_per_s=profile.speeds.peer_bytes_per_s)
    except ValueError as error:
        raise BadInputError(f"profile {profile.name}: {error}") from error
    replicas = tuple(
        ReplicaSetup(
            spec=_spec(ReplicaId(f"replica-{place}"), profile, options, rank),
            limits=limits,
            cost=replace(cost, max_lora_rank=rank),
        )
        for place, rank in enumerate(ranks)
    )
    return Scenario(
        trace=trace,
        adapters=versions_of(trace, bytes_per_rank=profile.adapter_bytes_per_rank),
        replicas=replicas,
        policy=options.policy,
        routing=options.routing,
        num_routers=options.num_routers,
        network_delay_s=options.network_delay_s,
        report_interval_s=options.report_interval_s,
        report_delay_s=max(0.001, 2 * options.network_delay_s),
        max_waiting=options.max_waiting,
        epoch_s=options.epoch_s,
        window_s=options.epoch_s if options.window_s is None else options.window_s,
        history_s=HISTORY_EPOCHS * options.epoch_s,
        forecast=options.forecast,
        origin=origin,
        peer=None if options.from_origin_only else peer,
        on_demand=options.on_demand,
        failures=options.failures,
        max_lora_ranks=options.max_lora_ranks,
        restart_s=options.restart_s,
        migration=options.migration,
        seed=seed,
        profiles={profile.name: known},
    )


def parse_failures(texts: Sequence[str]) -> tuple[Failure, ...]:
    """Failures from texts such as `replica-1@100s for 30s`; BadInputError shows the form."""
    failures = []
    for text in texts:
        match = _FAILURE.fullmatch(text.strip())
        try:
            if match is None:
                raise ValueError
            at_s, down_s = float(match["at"]), float(match["down"])
        except ValueError:
            raise BadInputError(f"--fail: {text!r}; expected such as 'replica-1@100s for 30s'") from None
        failures.append(Failure(replica_id=ReplicaId(match["replica"]), at_s=at_s, down_s=down_s))
    return tuple(sorted(failures, key=lambda failure: failure.at_s))


def _check_ranks(
    profile: Profile, trace: TraceColumns, options: ClusterOptions, ranks: tuple[int, ...]
) -> None:
    most = profile.engine.max_lora_rank
    if len(ranks) != options.num_replicas:
        raise BadInputError(f"replica_ranks: {len(ranks)}; expected one for each of {options.num_replicas}")
    if not 1 <= min(ranks) <= max(ranks) <= most:
        wrong = min(ranks) if min(ranks) < 1 else max(ranks)
        raise BadInputError(
            f"a replica's max_lora_rank: {wrong}; expected from 1 to {most}, the engine's of profile"
            f" {profile.name}"
        )
    highest = max(ranks)
    for adapter in trace.adapters:
        if adapter.rank is not None and highest < adapter.rank <= most:
            raise BadInputError(
                f"adapter {adapter.name} has rank {adapter.rank}, no replica takes more than {highest}; raise"
                " the highest max_lora_rank"
            )
    for adapter in trace.adapters:
        if adapter.rank is not None and adapter.rank > most:
            raise BadInputError(
                f"adapter {adapter.name} has rank {adapter.rank}, the engine of profile {profile.name} takes"
                f" {most} at most; give other ranks with --ranks, or another profile"
            )


def _cost(profile: Profile, options: ClusterOptions) -> StepCost:
    if profile.latency is None:
        raise ValueError("it has no latency model, so it cannot be simulated")
    if not 1e-6 <= options.speed <= 1e6:
        raise ValueError(f"speed: {options.speed}; expected from 1e-6 to 1e6")
    kernel = profile.latency.kernel
    if options.kernel is not None:
        if options.kernel not in set(RankKernel):
            raise BadInputError(f"--kernel: {options.kernel}; expected one of {', '.join(RankKernel)}")
        kernel = RankKernel(options.kernel)
    return StepCost.of(replace(profile.latency, kernel=kernel), options.speed)


def _known(profile: Profile, options: ClusterOptions, trace: TraceColumns) -> Profile:
    """What policies know: the profile as it is simulated, its operating points with it.

    A point under another kernel is the profile's own times the ratio of what both models give in the
    steady state with this trace's lengths. Under `padded_config` the point of a rank is what an engine with
    that `max_lora_rank` sustains, whatever it serves: so policies read it (`placement.capacity`).
    """
    old = profile.latency
    if old is None:
        return profile
    new = replace(old, kernel=RankKernel(options.kernel)) if options.kernel is not None else old
    points, mixed = profile.operating_points, profile.mixed_tokens_per_s
    if new.kernel is not old.kernel and len(trace):
        # What ranks cost side by side under another kernel, no steady state of one rank tells.
        mixed = None
        load = SteadyLoad(
            rows=profile.engine.max_num_seqs,
            prompt_tokens=float(trace.prompt_tokens.mean()),
            output_tokens=float(trace.output_tokens.mean()),
        )
        points = tuple(
            replace(point, tokens_per_s=point.tokens_per_s * _gain(old, new, load, point.rank))
            for point in points
        )
    if options.speed != 1.0:
        points = tuple(replace(point, tokens_per_s=point.tokens_per_s * options.speed) for point in points)
        mixed = None if mixed is None else mixed * options.speed
        new = replace(new, **{name: getattr(new, name) / options.speed for name in COEFFICIENTS})
    return replace(profile, latency=new, operating_points=points, mixed_tokens_per_s=mixed)


def _gain(old: LatencyModel, new: LatencyModel, load: SteadyLoad, rank: int) -> float:
    if new.kernel is RankKernel.PADDED_CONFIG:
        new = replace(new, max_lora_rank=rank)
    return steady_tokens_per_s(new, load, rank) / steady_tokens_per_s(old, load, rank)


def _limits(profile: Profile, trace: TraceColumns, options: ClusterOptions) -> ReplicaLimits:
    engine = profile.engine
    return ReplicaLimits(
        kv_blocks=engine.kv_blocks,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_tokens=engine.block_tokens,
        hash_block_tokens=trace.hash_block_tokens,
        adapter_slots=engine.adapter_slots,
        pool_adapters=options.pool_adapters or 0,
        pool_bytes=options.pool_bytes or 0,
        load_bytes_per_s=profile.speeds.host_to_gpu_bytes_per_s,
    )


def _spec(
    replica_id: ReplicaId, profile: Profile, options: ClusterOptions, max_lora_rank: int
) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=replica_id,
        max_lora_rank=max_lora_rank,
        pool_adapters=options.pool_adapters or _ENDLESS,
        pool_bytes=options.pool_bytes or _ENDLESS,
        profile=profile.name,
    )
