"""Every row of a step is computed with its own adapter, once, and base-model rows with none."""

from collections.abc import Sequence
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.engines.vllm_lora.rows import RowGroups, group_rows

SLOTS = {7: 0, 3: 2, 11: 1, 2: 3}

RUNS = st.lists(st.tuples(st.sampled_from([0, 0, *SLOTS]), st.integers(1, 9)), max_size=12)
ROWS = RUNS.map(lambda runs: [adapter for adapter, length in runs for _ in range(length)])


def rows_by_slot(groups: RowGroups) -> dict[int, list[int]]:
    """The step's own rows of each span."""
    found: dict[int, list[int]] = {}
    for span in groups.spans:
        assert span.slot not in found, "two spans for one adapter"
        rows: Sequence[int] = range(span.start, span.stop)
        if groups.order is not None:
            rows = groups.order[span.start : span.stop].tolist()
        found[span.slot] = list(rows)
    return found


@given(rows=ROWS)
def test_each_adapters_rows_are_one_span_in_their_order_and_base_rows_are_in_none(rows: list[int]) -> None:
    groups = group_rows(rows, SLOTS)
    expected: dict[int, list[int]] = {}
    for row, adapter in enumerate(rows):
        if adapter:
            expected.setdefault(SLOTS[adapter], []).append(row)
    assert rows_by_slot(groups) == expected
    if groups.order is not None:
        with_adapter = [row for row, adapter in enumerate(rows) if adapter]
        assert sorted(groups.order.tolist()) == with_adapter
        assert sum(span.stop - span.start for span in groups.spans) == len(with_adapter)


@given(rows=ROWS)
def test_rows_are_moved_only_where_an_adapters_rows_are_apart(rows: list[int]) -> None:
    runs = [adapter for adapter, _ in groupby(rows) if adapter]
    assert (group_rows(rows, SLOTS).order is not None) == (len(set(runs)) < len(runs))


@given(rows=ROWS.filter(any), data=st.data())
def test_an_adapter_in_no_slot_is_never_computed_with_another_ones_weights(
    rows: list[int], data: st.DataObject
) -> None:
    missing = data.draw(st.sampled_from([adapter for adapter in rows if adapter]))
    with pytest.raises(KeyError, match=str(missing)):
        group_rows(rows, {adapter: slot for adapter, slot in SLOTS.items() if adapter != missing})


def test_rows_may_be_a_list_or_a_tuple() -> None:
    rows = [0, 7, 7, 0, 3, 7]
    for sequence in (rows, tuple(rows)):
        assert rows_by_slot(group_rows(sequence, SLOTS)) == {0: [1, 2, 5], 2: [4]}
