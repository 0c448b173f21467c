"""Which `max_lora_rank` each of n replicas has: what is tried for a number of replicas.

Owns what a user may ask for and what is proposed; whether a mix holds, simulations say.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from loraserve.errors import BadInputError
from loraserve.simulator.scenario import Scenario
from placement.engine_sizes import RANK_STEPS
from placement.plans.rank_sizing import RankSizingLimits, size_ranks
from placement.types import ReplicaId, Snapshot
from traces.demand import demand_tokens_per_s

AUTO = "auto"
MAX_MIXES = 4
"""So many different mixes are tried for a number of replicas, at most."""

_PART = re.compile(r"(?P<rank>[0-9]{1,6})(?:\s*x\s*(?P<count>[0-9]{1,6}))?", re.ASCII)

Mix = tuple[int, ...]
"""Each replica's `max_lora_rank`, the lowest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `--max-lora-ranks` asks for: `rank` on every replica, exactly this `mix`, or neither: propose."""

    rank: int | None = None
    mix: Mix | None = None

    @classmethod
    def parse(cls, text: str) -> "Asked":
        """From `auto`, `128` or `16x3,128x1`; BadInputError."""
        if text.strip() == AUTO:
            return cls()
        ranks: list[int] = []
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None or not int(match["rank"]) or match["count"] in ("0", "00"):
                right = "auto, one such as 128, or such as 16x3,128x1: rank 16 on 3 replicas, 128 on 1"
                raise BadInputError(f"--max-lora-ranks: {text[:80]!r}; expected {right}")
            if match["count"] is None and "," not in text:
                return cls(rank=int(match["rank"]))
            ranks += [int(match["rank"])] * int(match["count"] or 1)
        return cls(mix=tuple(sorted(ranks)))


def mix_text(mix: Mix) -> str:
    """`3 x 16, 1 x 128`."""
    return ", ".join(f"{count} x {rank}" for rank, count in sorted(Counter(mix).items()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixes:
    """The mixes to try for a number of replicas.

    `scenarios` have each seed's requests on one replica; without any, every replica has `uniform`, and
    nothing is proposed. `num_lost` replicas may be lost, so that a rank wants one more than that.
    """

    uniform: int
    exactly: Mix | None = None
    scenarios: tuple[Scenario, ...] = ()
    num_lost: int = 0
    _known: dict[int, tuple[Mix, ...]] = field(default_factory=dict)

    def of(self, num_replicas: int) -> tuple[Mix, ...]:
        """All of them, the best by operating points first."""
        if self.exactly is not None:
            return (self.exactly,)
        if num_replicas not in self._known:
            self._known[num_replicas] = self._propose(num_replicas)
        return self._known[num_replicas]

    def _propose(self, num_replicas: int) -> tuple[Mix, ...]:
        """What is best for each seed's mean demand and for its peaks, and the highest setting everywhere."""
        found: Counter[Mix] = Counter()
        for scenario in self.scenarios:
            mean = _demand(scenario, is_peak=False)
            for demand in (mean, _demand(scenario, is_peak=True)):
                found[self._best(scenario, num_replicas, demand)] += 1
        uniform = (self.uniform,) * num_replicas
        found.pop(uniform, None)
        ranked = sorted(found, key=lambda mix: (-found[mix], mix))
        return (*ranked[: MAX_MIXES - 1], uniform)

    def _best(
        self, scenario: Scenario, num_replicas: int, demand: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    ) -> Mix:
        (setup,) = scenario.replicas
        specs = tuple(
            replace(setup.spec, replica_id=ReplicaId(f"replica-{place}"), max_lora_rank=self.uniform)
            for place in range(num_replicas)
        )
        # Before a cluster is started a setting costs nothing, so that whatever is better is worth it.
        free = RankSizingLimits(
            restart_s=0.0,
            drain_s=0.0,
            load_bytes_per_s=float("inf"),
            margin=0.0,
            min_gain=0.0,
            min_holders=1 + self.num_lost,
            highest=self.uniform,
        )
        plan = size_ranks(
            Snapshot(
                adapters=scenario.adapters,
                replicas=specs,
                demand_tokens_per_s={
                    adapter.version_id: float(tokens)
                    for adapter, tokens in zip(scenario.adapters, demand, strict=True)
                },
                profiles=scenario.profiles,
            ),
            free,
        )
        return tuple(sorted(plan.max_lora_ranks.get(spec.replica_id, self.uniform) for spec in specs))


def lowest_setting(ranks: Sequence[int], highest: int) -> int:
    """The lowest setting that takes all these ranks, of those that engines have, `highest` at most."""
    needed = max(ranks, default=1)
    return min(highest, next((step for step in RANK_STEPS if step >= needed), highest))


def _demand(scenario: Scenario, *, is_peak: bool) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Tokens/s of each adapter: over the whole trace, or in the epoch in which it had most."""
    trace = scenario.trace
    end_s = max(trace.duration_s, scenario.epoch_s)
    if not is_peak:
        return demand_tokens_per_s(trace, 0.0, end_s + 1e-9)
    epochs = np.floor(trace.arrival_s / scenario.epoch_s).astype(np.int64)
    tokens = (trace.prompt_tokens.astype(np.int64) + trace.output_tokens).astype(np.float64)
    peak = np.zeros(len(trace.adapters))
    named = trace.adapter >= 0
    size = len(trace.adapters)
    cells, place = np.unique(epochs[named] * size + trace.adapter[named], return_inverse=True)
    sums = np.bincount(place, weights=tokens[named], minlength=len(cells))
    np.maximum.at(peak, cells % max(size, 1), sums)
    return peak / scenario.epoch_s
