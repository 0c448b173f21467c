"""Seeded snapshots to compare placement policies on: how many replicas, who asks for what, how much room."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from placement.latency import LatencyModel, RankKernel
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, Snapshot, VersionId

RANKS = (8, 16, 32, 64, 128)
BYTES_PER_RANK = 2 << 20
TABLES = (
    (4164.0, 3910.0, 3490.0, 2960.0, 2440.0),
    (2400.0, 2100.0, 1900.0, 1700.0, 1600.0),
    (5500.0, 5400.0, 5250.0, 5000.0, 4500.0),
)
"""Operating points by rank: the issue's simulation, and two tables of LoRAServe's artifact."""

Popularity = Literal["uniform", "skewed", "anti-correlated"]
POPULARITIES: tuple[Popularity, ...] = ("uniform", "skewed", "anti-correlated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """`room` is the memory of all replicas over the bytes of all adapters, None for no limit; `load` the
    demand over what the replicas sustain if each rank has replicas of its own."""

    seed: int
    replicas: int
    adapters: int
    popularity: Popularity
    room: float | None = None
    load: float = 0.8
    table: int = 0
    kernel: RankKernel = RankKernel.PADDED_BATCH

    def snapshot(self) -> Snapshot:
        """The instance as policies see it."""
        rng = np.random.default_rng(self.seed)
        points = dict(zip(RANKS, TABLES[self.table], strict=True))
        ranks = rng.permutation([RANKS[place % len(RANKS)] for place in range(self.adapters)])
        weights = _weights(rng, self.popularity, ranks)
        each = weights / np.array([points[int(rank)] for rank in ranks])
        demand = weights * self.load * self.replicas / each.sum()
        adapters = tuple(_adapter(place, int(rank)) for place, rank in enumerate(ranks))
        whole = sum(adapter.size_bytes for adapter in adapters)
        pool = 1 << 62
        if self.room is not None:
            largest = max(adapter.size_bytes for adapter in adapters)
            pool = max(int(self.room * whole / self.replicas), largest)
        return Snapshot(
            adapters=adapters,
            replicas=tuple(
                ReplicaSpec(
                    replica_id=ReplicaId(f"replica-{place:04}"),
                    max_lora_rank=max(RANKS),
                    pool_adapters=1 << 40,
                    pool_bytes=pool,
                    profile="measured",
                )
                for place in range(self.replicas)
            ),
            demand_tokens_per_s={
                adapter.version_id: float(one) for adapter, one in zip(adapters, demand, strict=True)
            },
            profiles={"measured": profile_of(points, self.kernel)},
            seed=self.seed,
        )


def drawn(number: int, *, seed: int = 0, most_replicas: int = 64) -> list[Instance]:
    """So many instances, each popularity in turn, from 2 to `most_replicas` replicas."""
    rng = np.random.default_rng(seed)
    found = []
    for place in range(number):
        replicas = int(np.round(2 * (most_replicas / 2) ** rng.random()))
        found.append(
            Instance(
                seed=seed + place,
                replicas=replicas,
                adapters=int(replicas * rng.integers(3, 40)) + 5,
                popularity=POPULARITIES[place % len(POPULARITIES)],
                room=(None, 2.5, 4.0, 8.0)[int(rng.integers(4))],
                load=float(rng.uniform(0.3, 1.2)),
                table=int(rng.integers(len(TABLES))),
            )
        )
    return found


def profile_of(points: dict[int, float], kernel: RankKernel) -> Profile:
    """A profile with these operating points, whose kernel charges so."""
    return Profile(
        name="measured",
        source="made for a test",
        engine=EngineFacts(kind="made", model="made", kv_blocks=1000),
        latency=LatencyModel(kernel=kernel),
        latency_basis="derived",
        operating_points=tuple(
            OperatingPoint(rank=rank, tokens_per_s=float(value)) for rank, value in sorted(points.items())
        ),
    )


def _weights(rng: np.random.Generator, popularity: Popularity, ranks: np.ndarray) -> np.ndarray:
    if popularity == "uniform":
        return rng.uniform(0.5, 1.5, len(ranks))
    skewed = rng.permutation(1.0 / np.arange(1, len(ranks) + 1))
    if popularity == "skewed":
        return skewed
    # The lower the rank, the more popular, within what chance allows.
    return np.sort(skewed)[::-1][np.argsort(np.argsort(ranks + rng.uniform(0, 40, len(ranks))))]


def _adapter(place: int, rank: int) -> AdapterVersion:
    return AdapterVersion(
        version_id=VersionId(f"adapter-{place:06}@made"),
        name=AdapterName(f"adapter-{place:06}"),
        sha256=f"{place:064x}",
        rank=rank,
        size_bytes=rank * BYTES_PER_RANK,
    )
