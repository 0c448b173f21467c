"""What routers know of a replica's speed: a profile's facts as far as choosing among holders needs them.

Owns no files and measures nothing. A routing table carries one per replica, so that routers read no
profiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.latency import LatencyModel
from placement.profile import OperatingPoint, Profile
from placement.types import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCost:
    """One replica's latency model and the limits of its engine's batch, see `placement.profile`.

    `operating_points` are tokens/s by rank, the lowest rank first, () if not measured; `tbt_slo_ms` is the
    target for the gap between two tokens, None without one.
    """

    latency: LatencyModel
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_tokens: int = 2**31 - 1
    adapter_slots: int = 2**31 - 1
    operating_points: tuple[OperatingPoint, ...] = ()
    tbt_slo_ms: float | None = None


class CostBook:
    """What replicas of known profiles cost; each kind and setting is worked out once and shared by tables."""

    def __init__(self, profiles: Mapping[str, Profile]) -> None:
        self._profiles = profiles
        self._known: dict[tuple[str, int], ReplicaCost | None] = {}

    def of(self, spec: ReplicaSpec) -> ReplicaCost | None:
        """The replica's cost, None where nothing is known."""
        key = (spec.profile, spec.max_lora_rank)
        if key not in self._known:
            self._known[key] = cost_of(self._profiles.get(spec.profile), spec.max_lora_rank)
        return self._known[key]


def cost_of(profile: Profile | None, max_lora_rank: int) -> ReplicaCost | None:
    """What the profile says of a replica whose engine is set to `max_lora_rank`; None without a latency
    model."""
    if profile is None or profile.latency is None:
        return None
    engine = profile.engine
    return ReplicaCost(
        latency=replace(profile.latency, max_lora_rank=max_lora_rank),
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_tokens=engine.kv_tokens,
        adapter_slots=engine.adapter_slots,
        operating_points=profile.operating_points,
        tbt_slo_ms=None if profile.slo is None else profile.slo.tbt_ms,
    )
