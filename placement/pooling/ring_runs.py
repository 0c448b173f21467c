"""Where on a ring of replicas runs of neighbours begin, so that all members have alike to do and to hold."""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np

from placement.pooling.fleet import Floats, Ints

_SINGLE = 0.1
"""So much of a member's part per copy is charged to the place where the run begins, wherever it ends."""


def begins(
    work: Sequence[float],
    copies: Sequence[int],
    size: Sequence[float],
    loads: Floats,
    filled: Sequence[float],
    room: Sequence[float],
    usual: int,
) -> list[int]:
    """The place of the ring from which on each adapter is to be held, the most work per copy first.

    `work` in parts of a member's fair one, `copies` and `size` by adapter; `loads`, in fair parts, the part
    `filled` and `room`, in the units of `size`, by place. A place is charged for what begins there, and a run
    of places for what is more than the part of one, so that runs of the `usual` number of copies have alike
    to do wherever they begin.
    """
    number, found = len(loads), list[int]()
    loads = loads.copy()
    single = min(1.0, _SINGLE * (usual + 1))
    for asked, many in zip(work, copies, strict=True):
        if many <= usual + 1 and asked <= single:
            break
        width = min(max(many - usual + 1, int(asked) + 1), number)
        begin = _lightest(loads, width)
        loads[(begin + np.arange(width)) % number] += asked / width
        found.append((begin + (width - 1 - many + usual) // 2) % number if many < number else 0)
    load_of, full = loads.tolist(), list(filled)
    heap = [(max(load_of[place], full[place]), place) for place in range(number)]
    heapify(heap)
    for at in range(len(found), len(work)):
        place, many = heap[0][1], copies[at]
        if many >= number:
            found.append(0)
            continue
        found.append(place)
        load = load_of[place] = load_of[place] + work[at]
        held = full[place] = full[place] + many * size[at] / room[place]
        heapreplace(heap, (load if load > held else held, place))
    return found


def along(begin: Ints, copies: Ints, each: Floats, number: int) -> Floats:
    """The sum of `each` over the runs that cover a place, for every place of a ring of so many."""
    steps = np.bincount(begin, each, 2 * number + 1) - np.bincount(
        begin + np.minimum(copies, number), each, 2 * number + 1
    )
    sums = np.cumsum(steps)
    return np.asarray(sums[:number] + sums[number : 2 * number], dtype=np.float64)


def run(members: tuple[int, ...], start: int, copies: int) -> tuple[int, ...]:
    """So many neighbours from a place of the ring on, in ascending order."""
    end = start + copies
    if end <= len(members):
        return members[start:end]
    return members if copies >= len(members) else (*members[: end - len(members)], *members[start:])


def _lightest(loads: Floats, copies: int) -> int:
    """Where the run of so many places begins that has the least to do."""
    sums = np.cumsum(np.concatenate(([0.0], loads, loads[: copies - 1])))
    return int(np.argmin(sums[copies:] - sums[:-copies]))
