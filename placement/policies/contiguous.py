"""Dealing adapters by rank in equal chunks of neighbours, one copy each.

What LoRAServe's artifact does as its baseline "contiguous", and itself before any demand is known.
"""

from collections.abc import Mapping, Sequence

from placement.policies.base import Room
from placement.policies.roomiest import Roomiest
from placement.types import AdapterVersion, ReplicaId, ReplicaSpec


def by_reach(specs: Sequence[ReplicaSpec]) -> list[ReplicaSpec]:
    """The replicas in the order in which ranks, the lowest first, take them: those that admit the highest
    ranks come last."""
    return sorted(
        specs,
        key=lambda spec: (
            spec.max_lora_rank,
            spec.pool_bytes,
            spec.pool_adapters,
            spec.profile,
            spec.replica_id,
        ),
    )


def deal_by_rank(
    adapters: Sequence[AdapterVersion], specs: Sequence[ReplicaSpec]
) -> Mapping[ReplicaId, Room]:
    """The rooms after each replica took its chunk, whose sizes differ by one at most.

    What its own chunk's replica has no room for goes where most is left, the largest first; what fits
    nowhere is left out.
    """
    copies = Roomiest(specs)
    order = sorted(adapters, key=lambda adapter: (adapter.rank, adapter.name, adapter.version_id))
    size, more = divmod(len(order), max(1, len(specs)))
    overflow: list[AdapterVersion] = []
    begin = 0
    for place, spec in enumerate(by_reach(specs)):
        end = begin + size + (place < more)
        # The highest rank first, since it has the fewest other homes.
        for adapter in reversed(order[begin:end]):
            if copies.rooms[spec.replica_id].fits(adapter):
                copies.put(adapter, (spec.replica_id,))
            else:
                overflow.append(adapter)
        begin = end
    overflow.sort(key=lambda adapter: (-adapter.rank, -adapter.size_bytes, adapter.version_id))
    for adapter in overflow:
        copies.put(adapter, ())
    return copies.rooms
