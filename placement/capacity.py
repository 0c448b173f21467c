"""How many tokens per second a replica sustains for requests of one rank, given what else it serves.

The one place where a profile's kernel decides what rank costs; policies ask here and nowhere else.
"""

from collections.abc import Mapping

from placement.latency import RankKernel
from placement.profile import Profile
from placement.types import ReplicaSpec

FLAT_TOKENS_PER_S = 1000.0
"""What a replica without a profile is taken to sustain of every rank; only ratios of it matter."""


def kernel_of(profile: Profile | None) -> RankKernel | None:
    """What the replica's engine charges ranks for; None where rank does not matter or nothing is known."""
    if profile is None or profile.latency is None or not profile.operating_points:
        return None
    return profile.latency.kernel


def tokens_per_s(profiles: Mapping[str, Profile], spec: ReplicaSpec, rank: int, highest: int) -> float:
    """Prompt and output tokens/s that this replica sustains of requests of `rank`, if the highest rank
    among all that it serves is `highest` (>= rank).

    `padded_config` charges the engine's setting, whatever it serves; `padded_batch` the highest rank served
    (the worst case: batches without it are cheaper); `sum` each request's own.
    """
    profile = profiles.get(spec.profile)
    if profile is None or not profile.operating_points:
        return FLAT_TOKENS_PER_S
    match kernel_of(profile):
        case RankKernel.PADDED_CONFIG:
            return profile.operating_point(spec.max_lora_rank)
        case RankKernel.SUM:
            return profile.operating_point(rank)
        case _:
            return profile.operating_point(max(rank, highest))
