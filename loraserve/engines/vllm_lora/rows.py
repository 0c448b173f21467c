"""Groups the rows of a step by the slot of their adapter, once for all layers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows `start` to `stop` (exclusive) belong to the adapter in `slot`."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroups:
    """One span per adapter of the step; base-model rows are in none.

    `order` None: spans count the step's own rows. Else they count the rows that `order` picks, shape
    [rows with an adapter], and results go back to those rows.
    """

    spans: tuple[Span, ...] = ()
    order: NDArray[np.int64] | None = None


def group_rows(adapter_ids: Sequence[int], slot_of: dict[int, int]) -> RowGroups:
    """Group rows, given each row's adapter (0: base model) and each adapter's slot.

    KeyError for an adapter that is in no slot: a wrong answer would be the alternative.
    """
    ids = np.asarray(adapter_ids, dtype=np.int64)
    if not ids.size or not ids.any():
        return RowGroups()
    begins = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [ids.size]))
    runs = [(int(ids[begin]), int(begin), int(end)) for begin, end in pairwise(begins) if ids[begin]]
    if len({adapter for adapter, _, _ in runs}) == len(runs):
        return RowGroups(
            spans=tuple(Span(slot=slot_of[adapter], start=begin, stop=end) for adapter, begin, end in runs)
        )
    return _gathered(ids, slot_of)


def _gathered(ids: NDArray[np.int64], slot_of: dict[int, int]) -> RowGroups:
    """Scattered rows are brought together: few large products cost less than many small ones."""
    order = np.argsort(ids, kind="stable")
    order = order[np.count_nonzero(ids == 0) :]  # base-model rows sort first
    adapters, counts = np.unique(ids[order], return_counts=True)
    stops = np.cumsum(counts)
    spans = tuple(
        Span(slot=slot_of[int(adapter)], start=int(stop - count), stop=int(stop))
        for adapter, count, stop in zip(adapters, counts, stops, strict=True)
    )
    return RowGroups(spans=spans, order=order)
