"""LoRAServe's ALLOCATEHIGHESTMAXRANK: room for what the ranks' own replicas had none for.

Meant is: on replicas that serve that rank or a higher one already, so that no replica's highest rank rises
if that can be avoided. What the paper has not, as its replicas hold any number of adapters: a first copy
for those that found no room, in the place of second ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from placement.policies.loraserve_packing import REST, Ask, Bin, most_first
from placement.policies.room_arrays import Mask, RoomArrays
from placement.types import AdapterVersion, VersionId

SMALL = 1e-3
"""Less utilisation than this is dealt out in turn, and demand may exceed space by as much."""


class Leftovers:
    """Places what is left over in bins that are partly full; they are filled through it alone."""

    def __init__(self, bins: Sequence[Bin], target: float, capacity: Mapping[int, float]) -> None:
        self._bins = bins
        self._target = target
        self._capacity = capacity
        self._rooms = RoomArrays(one.room for one in bins)
        self._ranks = np.array([one.max_rank for one in bins])
        self._utils = np.array([one.util for one in bins])
        self._turn = 0

    def place(self, leftovers: Sequence[Ask]) -> list[Ask]:
        """Place these, the most tokens/s first; returns those that no replica has room for.

        If they exceed the space under the target, all are scaled down alike. The rest of one that is too
        small to split for goes to those that have it, by their shares.
        """
        homes = self._homes({ask.adapter.version_id for ask in leftovers})
        scale = self._scale(leftovers)
        homeless: list[Ask] = []
        for ask in sorted(leftovers, key=most_first):
            adapter, left = ask.adapter, ask.left * scale
            here = homes[adapter.version_id]
            small = SMALL * self._capacity[adapter.rank]
            if left >= small:
                self._fill(adapter, left, here, small)
            elif left > 0 or not here:
                self._deal(adapter, left, here)
            if not here:
                homeless.append(ask)
        return homeless

    def _homes(self, versions: set[VersionId]) -> dict[VersionId, set[int]]:
        homes: dict[VersionId, set[int]] = {version: set() for version in versions}
        for index, one in enumerate(self._bins):
            for version in versions & one.tokens_per_s.keys():
                homes[version].add(index)
        return homes

    def _scale(self, leftovers: Sequence[Ask]) -> float:
        wanted = sum(ask.left / self._capacity[ask.adapter.rank] for ask in leftovers)
        space = float(np.maximum(self._target - self._utils, 0.0).sum())
        return space / wanted if wanted - space >= SMALL else 1.0

    def _fill(self, adapter: AdapterVersion, left: float, here: set[int], small: float) -> None:
        while left >= small and (index := self._below_target(adapter, here)) is not None:
            one = self._bins[index]
            part = min(left, (self._target - one.util) * one.capacity[adapter.rank])
            self._put(index, adapter, part, here)
            left -= part
        if left >= small or not here:
            index = self._roomy(adapter, left, here)
            if index is not None:
                self._put(index, adapter, left, here)

    def _below_target(self, adapter: AdapterVersion, here: set[int]) -> int | None:
        """Of those below the target that serve its rank or a higher one the one with the most space; if
        there is none, the one whose highest rank rises by least."""
        below = self._takes(adapter, here) & (self._utils < self._target - REST)
        level = below & (self._ranks >= adapter.rank)
        if level.any():
            return int(np.argmin(np.where(level, self._utils, np.inf)))
        if not below.any():
            return None
        below &= self._ranks == self._ranks[below].max()
        return int(np.argmin(np.where(below, self._utils, np.inf)))

    def _roomy(self, adapter: AdapterVersion, left: float, here: set[int]) -> int | None:
        """The first that stays within its operating point, or within the target if that is above; for one
        that has no home yet the least utilised if none does."""
        takes = self._takes(adapter, here)
        fitting = takes & (self._utils + left / self._capacity[adapter.rank] <= max(1.0, self._target))
        for mask in (fitting & (self._ranks >= adapter.rank), fitting):
            if mask.any():
                return int(np.argmax(mask))
        if here or not takes.any():
            return None
        return int(np.argmin(np.where(takes, self._utils, np.inf)))

    def _deal(self, adapter: AdapterVersion, left: float, here: set[int]) -> None:
        """In turn over those that serve its rank or a higher one, else to the one that rises by least."""
        index = self._turn % len(self._bins)
        one = self._bins[index]
        if one.max_rank < adapter.rank or not one.takes(adapter):
            takes = self._takes(adapter, here)
            if not takes.any():
                return
            level = takes & (self._ranks >= adapter.rank)
            if level.any():
                index = int(np.argmax(np.roll(level, -index)) + index) % len(self._bins)
            else:
                index = int(np.argmax(np.where(takes, self._ranks, -1)))
        self._turn = index + 1
        self._put(index, adapter, left, here)

    def _takes(self, adapter: AdapterVersion, here: set[int]) -> Mask:
        takes = self._rooms.fitting(adapter)
        takes[list(here)] = True
        return takes

    def _put(self, index: int, adapter: AdapterVersion, tokens_per_s: float, here: set[int]) -> None:
        one = self._bins[index]
        one.put(adapter, tokens_per_s)
        here.add(index)
        self._ranks[index], self._utils[index] = one.max_rank, one.util
        self._rooms.look_again(index)


def instead_of_second_copies(homeless: Sequence[Ask], bins: Sequence[Bin]) -> None:
    """Give those that found no room that of copies whose adapters have others, the fewest tokens/s first,
    while there are such."""
    copies = Counter(version for one in bins for version in one.tokens_per_s)
    refused: list[AdapterVersion] = []
    for ask in sorted(
        homeless, key=lambda ask: (-ask.adapter.rank, -ask.adapter.size_bytes, most_first(ask))
    ):
        adapter = ask.adapter
        # Room only gets less, so what was refused once is refused to all that need no less.
        if any(one.rank <= adapter.rank and one.size_bytes <= adapter.size_bytes for one in refused):
            continue
        found = min(
            (
                (sum(one.tokens_per_s[version] for version in given_up), index, given_up)
                for index, one in enumerate(bins)
                if (given_up := _to_give_up(one, adapter, copies)) is not None
            ),
            default=None,
        )
        if found is None:
            refused.append(adapter)
            continue
        _, index, given_up = found
        for version in given_up:
            bins[index].drop(version)
            copies[version] -= 1
        bins[index].put(adapter, ask.tokens_per_s)
        copies[adapter.version_id] += 1


def _to_give_up(one: Bin, adapter: AdapterVersion, copies: Mapping[VersionId, int]) -> list[VersionId] | None:
    """The copies that must go from here for the adapter to fit, () if none need; None if it cannot."""
    if not one.room.spec.admits(adapter):
        return None
    free_adapters, free_bytes = one.room.free_adapters, one.room.free_bytes
    given_up: list[VersionId] = []
    second = (version for version in one.tokens_per_s if copies[version] > 1)
    for version in sorted(second, key=lambda version: (one.tokens_per_s[version], version)):
        if free_adapters > 0 and free_bytes >= adapter.size_bytes:
            break
        given_up.append(version)
        free_adapters += 1
        free_bytes += one.sizes[version]
    return given_up if free_adapters > 0 and free_bytes >= adapter.size_bytes else None
