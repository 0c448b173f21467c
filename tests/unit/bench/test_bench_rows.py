"""Which batches `bench rank` measures."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.bench.rank_rows import MODES, Mode, RankedAdapter, Row, Sizes, base_of, plan_rows

SIZES = Sizes()
ADAPTERS = tuple(
    RankedAdapter(name=name, rank=rank)
    for name, rank in (("a", 8), ("b", 8), ("c", 32), ("d", 64), ("e", 128), ("f", 128))
)


def rows(mode: Mode, *, quick: bool = False) -> dict[str, Row]:
    sets = plan_rows(mode, ADAPTERS, SIZES, num_slots=4, quick=quick)
    return {row.name: row for one in sets for row in one.rows}


ranked = st.lists(st.sampled_from([1, 8, 16, 64, 128, 256]), min_size=1, max_size=12).map(
    lambda ranks: tuple(RankedAdapter(name=f"n{at}", rank=rank) for at, rank in enumerate(ranks))
)


@given(adapters=ranked, mode=st.sampled_from(MODES), quick=st.booleans())
def test_every_row_has_its_adapters_loaded_and_its_shape_without_adapters_measured(
    adapters: tuple[RankedAdapter, ...], mode: Mode, quick: bool
) -> None:
    sets = plan_rows(mode, adapters, SIZES, num_slots=4, quick=quick)
    without = {
        row.name: row
        for one in plan_rows("off", adapters, SIZES, num_slots=4, quick=quick)
        for row in one.rows
    }
    names = [row.name for one in sets for row in one.rows]
    assert len(names) == len(set(names))
    for one in sets:
        assert len(one.loaded) <= 4
        for row in one.rows:
            assert {name for name in row.adapters if name} <= set(one.loaded)
            base = without[f"{row.kind}_{row.base}"]
            assert (len(base.adapters), base.prompt_tokens) == (len(row.adapters), row.prompt_tokens)
            assert set(base.adapters) == {None}
            assert row.base == base_of(row.kind, row.batch)
            if row.kind == "prefill" and not row.base.endswith("_part"):
                assert len(row.adapters) * row.prompt_tokens == SIZES.prompt_tokens


def test_a_mixed_batch_is_its_two_parts_taken_in_turn() -> None:
    for kind in ("prefill", "decode"):
        found = rows("rank-true")
        mixed, low, high = (found[f"{kind}_{one}"] for one in ("mixed", "low_part", "high_part"))
        assert mixed.adapters[0::2] == low.adapters
        assert mixed.adapters[1::2] == high.adapters
        assert set(low.adapters) == {"a", "b"}
        assert set(high.adapters) == {"e", "f"}
        assert mixed.prompt_tokens == low.prompt_tokens == high.prompt_tokens
    assert Counter(rows("rank-true")["decode_mixed"].adapters) == {"a": 2, "b": 2, "e": 2, "f": 2}


def test_a_rank_alone_is_one_prompt_or_all_sequences_on_one_adapter() -> None:
    for rank, name in ((8, "a"), (32, "c"), (64, "d"), (128, "e")):
        assert rows("stock")[f"prefill_r{rank}"].adapters == (name,)
        assert rows("stock")[f"decode_r{rank}"].adapters == (name,) * 8


def test_an_engine_without_lora_is_asked_for_the_base_model_alone() -> None:
    assert {name for row in rows("off").values() for name in row.adapters} == {None}


@pytest.mark.parametrize("mode", MODES)
def test_quick_leaves_rows_out_and_adds_none(mode: Mode) -> None:
    assert rows(mode, quick=True).items() <= rows(mode).items()
    assert {"prefill_base", "decode_base"} <= rows(mode, quick=True).keys()
