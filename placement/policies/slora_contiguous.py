"""`slora-contiguous`: adapters sorted by rank and dealt in equal chunks of neighbours, one copy each.

The static baseline of the LoRAServe paper's artifact (S-LoRA Contiguous): it knows ranks and no demand.
"""

from dataclasses import dataclass

from placement.policies.base import equal_shares
from placement.policies.contiguous import deal_by_rank
from placement.policies.permutation import permuted
from placement.types import Placement, Snapshot


@dataclass(frozen=True, slots=True)
class SloraContiguous:
    """One copy per adapter, ranks beside their neighbours, evenly many per replica."""

    name: str = "slora-contiguous"

    def plan(self, snapshot: Snapshot) -> Placement:
        """The chunks, each on the replica that holds most of it."""
        rooms = deal_by_rank(snapshot.adapters, snapshot.replicas)
        return permuted(equal_shares(rooms.values(), snapshot.adapters), snapshot)
