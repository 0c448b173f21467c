"""What if: what is not asked about stays bit for bit, and what is comes out as many as asked for."""

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraserve.errors import BadInputError
from loraserve.simulator.run import simulate
from loraserve.simulator.what_if import WhatIf, lost_replicas
from tests.support.simulated import poisson_trace, replicas_of, scenario_of, trace_of_columns
from traces.columns import TraceAdapter, TraceColumns

Rows = list[tuple[float, int, int, int, tuple[int, ...]]]
NAMES = ("acme-a", "acme-b", "bolt-a", "bolt-b", "base-ball")

seeds = st.integers(0, 2**63 - 1)
factors = st.floats(0, 4).map(lambda value: round(value, 3))


@st.composite
def traces(draw: st.DrawFn) -> TraceColumns:
    """Bursts, ties, the base model, some with prompt blocks; every adapter and the base model has some."""
    number = draw(st.integers(12, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrival_s = np.cumsum(rng.exponential(1.0, number) * rng.choice([0.0, 0.1, 5.0], number))
    adapter = np.concatenate((np.arange(-1, len(NAMES)), rng.integers(-1, len(NAMES), number - 6)))
    trace = trace_of_columns(
        arrival_s - arrival_s[0], rng.integers(1, 900, number), rng.integers(1, 90, number), adapter
    )
    trace = replace(trace, adapters=tuple(TraceAdapter(name=name, rank=8) for name in NAMES))
    if draw(st.booleans()):
        counts = rng.integers(0, 4, number)
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        # More ids than offsets, as a trace that was cut has them.
        ids = rng.integers(-(2**63), 2**63 - 1, offsets[-1] + 3, dtype=np.int64)
        trace = replace(trace, hash_offsets=offsets, hash_ids=ids)
    return trace


def rows_of(trace: TraceColumns, among: NDArray[np.bool_] | None = None) -> Rows:
    columns = (trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.adapter)
    hashes: list[tuple[int, ...]] = [()] * len(trace)
    if trace.hash_offsets is not None and trace.hash_ids is not None:
        bounds = trace.hash_offsets.tolist()
        ids = trace.hash_ids.tolist()
        hashes = [tuple(ids[low:high]) for low, high in pairwise(bounds)]
    rows = list(zip(*(column.tolist() for column in columns), hashes, strict=True))
    return rows if among is None else [row for row, chosen in zip(rows, among, strict=True) if chosen]


def is_within(rows: Rows, others: Rows) -> bool:
    """Whether these are among the others, in their order."""
    rest = iter(others)
    return all(row in rest for row in rows)


def check_columns(trace: TraceColumns, before: TraceColumns) -> None:
    """What every workload must be, and what none of these may leave."""
    assert np.all(np.diff(trace.arrival_s) >= 0)
    assert trace.arrival_s[0] >= 0
    assert trace.duration_s <= before.duration_s
    assert trace.adapters[: len(before.adapters)] == before.adapters
    assert len({adapter.name for adapter in trace.adapters}) == len(trace.adapters)
    assert trace.adapter.dtype == trace.prompt_tokens.dtype == np.int32
    pairs = set(zip(before.prompt_tokens.tolist(), before.output_tokens.tolist(), strict=True))
    assert set(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)) <= pairs


# -- more adapters -----------------------------------------------------------------------------


@given(trace=traces(), seed=seeds, number=st.integers(1, 9), rank=st.sampled_from([4, 64]))
def test_added_adapters_come_on_top_each_as_popular_as_the_mean(
    trace: TraceColumns, seed: int, number: int, rank: int
) -> None:
    found = WhatIf.parse(add=[f"{number}x{rank}"]).apply(trace, seed)
    check_columns(found, trace)
    old = found.adapter < len(NAMES)
    assert rows_of(found, old) == rows_of(trace)
    assert [(one.name, one.rank) for one in found.adapters[len(NAMES) :]] == [
        (f"added-rank-{rank}-{place}", rank) for place in range(number)
    ]
    counts = [int((found.adapter == len(NAMES) + place).sum()) for place in range(number)]
    assert sum(counts) == round(number * int((trace.adapter >= 0).sum()) / len(NAMES))
    assert max(counts) - min(counts) <= 1


@given(trace=traces(), seed=seeds, percent=st.integers(0, 300))
def test_added_adapters_have_the_share_that_is_asked_for(
    trace: TraceColumns, seed: int, percent: int
) -> None:
    found = WhatIf.parse(add=[f"3x8@{percent / 100}"]).apply(trace, seed)
    again = WhatIf.parse(add=[f"3x8@{percent}%"]).apply(trace, seed)
    check_columns(found, trace)
    assert len(found) - len(trace) == round(percent / 100 * len(trace))
    assert rows_of(found) == rows_of(again)
    if trace.hash_ids is not None:
        # A request of its lengths has as many blocks, and nobody else has these.
        blocks = {(prompt, output, len(ids)) for _, prompt, output, _, ids in rows_of(trace)}
        for _, prompt, output, _, ids in rows_of(found, found.adapter >= len(NAMES)):
            assert (prompt, output, len(ids)) in blocks
            assert not set(ids) & set(trace.hash_ids.tolist())


@given(trace=traces(), seed=seeds)
def test_additions_stand_beside_each_other_and_leave_each_other_alone(trace: TraceColumns, seed: int) -> None:
    one, both = (WhatIf.parse(add=add).apply(trace, seed) for add in (["2x8"], ["2x8", "3x8@1"]))
    assert rows_of(both, both.adapter < len(NAMES) + 2) == rows_of(one)
    assert int((both.adapter >= len(NAMES) + 2).sum()) == len(trace)
    again = WhatIf.parse(add=["1x8"]).apply(one, seed)
    assert [adapter.name for adapter in again.adapters[len(NAMES) :]] == [
        f"added-rank-8-{k}" for k in range(3)
    ]


def test_added_traffic_rises_and_falls_with_what_there_is() -> None:
    quiet, busy = np.linspace(0, 100, 50, endpoint=False), np.linspace(100, 110, 1000)
    trace = trace_of_columns(np.concatenate((quiet, busy)), 10, 10, 0, num_adapters=1)
    found = WhatIf.parse(add=["4x8@2"]).apply(trace, 0)
    added = found.arrival_s[found.adapter > 0]
    assert 0.92 < float((added >= 100).mean()) < 0.98
    assert len(np.unique(added)) == len(added)


# -- more and less traffic ---------------------------------------------------------------------


@given(trace=traces(), seed=seeds, factor=factors, pattern=st.sampled_from(["acme-*", "bolt-a", "base", "*"]))
def test_a_factor_is_kept_to_the_request_and_others_stay_bit_for_bit(
    trace: TraceColumns, seed: int, factor: float, pattern: str
) -> None:
    named = {"acme-*": [0, 1], "bolt-a": [2], "base": [-1], "*": [0, 1, 2, 3, 4]}[pattern]
    found = WhatIf.parse(scale=[f"{pattern}={factor}"]).apply(trace, seed)
    check_columns(found, trace)
    meant, before = np.isin(found.adapter, named), np.isin(trace.adapter, named)
    assert rows_of(found, ~meant) == rows_of(trace, ~before)
    num_before = int(before.sum())
    assert int(meant.sum()) == int(factor) * num_before + round((factor - int(factor)) * num_before)
    old, new = rows_of(trace, before), rows_of(found, meant)
    assert is_within(old, new) if factor >= 1 else is_within(new, old)


@given(trace=traces(), seed=seeds, factor=st.integers(2, 4))
def test_a_copy_is_of_its_original_s_adapter_and_comes_soon_after_it(
    trace: TraceColumns, seed: int, factor: int
) -> None:
    found = WhatIf.parse(scale=[f"acme-*={factor}"]).apply(trace, seed)
    mean_gap_s = trace.duration_s / (len(trace) - 1)
    for place in (0, 1):
        before, after = (one.arrival_s[one.adapter == place] for one in (trace, found))
        assert len(after) == factor * len(before)
        late_s = np.sort(after) - np.repeat(np.sort(before), factor)
        assert np.all(late_s >= 0)
        assert np.all(late_s <= mean_gap_s)


@given(trace=traces(), seed=seeds)
def test_copies_share_blocks_with_each_other_as_the_originals_do_and_with_no_original(
    trace: TraceColumns, seed: int
) -> None:
    if trace.hash_ids is None:
        return
    found = WhatIf.parse(scale=["*=2", "base=2"]).apply(trace, seed)
    old = [ids for *_, ids in rows_of(trace) if ids]
    new = [ids for *_, ids in rows_of(found) if ids]
    copies = [ids for ids in new if not set(ids) & set(sum(old, ()))]
    assert len(copies) == len(new) - len(old) == len(old)
    assert len(set(sum(copies, ()))) == len(set(sum(old, ())))


@given(trace=traces(), seed=seeds)
def test_more_of_a_factor_keeps_what_less_of_it_gave(trace: TraceColumns, seed: int) -> None:
    steps = [
        rows_of(WhatIf.parse(scale=[f"acme-*={factor}"]).apply(trace, seed))
        for factor in (0, 0.3, 0.8, 1, 1.5, 2, 3)
    ]
    assert all(is_within(less, more) for less, more in pairwise(steps))


@given(trace=traces(), seed=seeds)
def test_factors_of_several_patterns_multiply_and_additions_go_by_what_comes_of_it(
    trace: TraceColumns, seed: int
) -> None:
    both = WhatIf.parse(scale=["acme-*=2", "*-a=1.5"], add=["1x8@1"]).apply(trace, seed)
    counts = {name: int((both.adapter == place).sum()) for place, name in enumerate(NAMES)}
    before = {name: int((trace.adapter == place).sum()) for place, name in enumerate(NAMES)}
    assert counts["acme-a"] == 3 * before["acme-a"]
    assert counts["acme-b"] == 2 * before["acme-b"]
    assert counts["bolt-b"] == before["bolt-b"]
    assert int((both.adapter == len(NAMES)).sum()) * 2 == len(both)


@given(trace=traces(), seed=seeds)
def test_the_same_seed_asks_the_same_and_nothing_asked_is_nothing_done(
    trace: TraceColumns, seed: int
) -> None:
    what_if = WhatIf.parse(scale=["acme-*=2.5", "base=0.5"], add=["5x16"], lose="1")
    assert rows_of(what_if.apply(trace, seed)) == rows_of(what_if.apply(trace, seed))
    assert WhatIf().apply(trace, seed) is trace
    assert WhatIf.parse(lose="1").apply(trace, seed) is trace
    assert pickle.loads(pickle.dumps(what_if)) == what_if


# -- lost replicas -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "at_s"), [("2", 30.0), ("2@45s", 45.0), ("2@50%", 45.0), ("2@0s", 0.0), ("2@100%", 90.0)]
)
def test_the_last_replicas_are_lost_when_it_says(text: str, at_s: float) -> None:
    failures = lost_replicas(text, 5, 90.0)
    assert [(one.at_s, one.replica_id) for one in failures] == [(at_s, "replica-3"), (at_s, "replica-4")]
    assert WhatIf.parse(lose=text).failures(5, 90.0) == failures
    assert WhatIf().failures(5, 90.0) == ()


def test_a_lost_replica_serves_nothing_any_more_and_the_others_serve_everything() -> None:
    trace = poisson_trace(400, 20.0)
    lost = [
        replace(one, replica_id=setup.spec.replica_id)
        for one, setup in zip(lost_replicas("1@50%", 2, trace.duration_s), replicas_of(1), strict=True)
    ]
    result = simulate(scenario_of(trace, replicas_of(2), failures=tuple(lost), epoch_s=5.0))
    late = np.flatnonzero(result.arrival_ps > lost[0].at_s * 1e12)
    assert len(late) > 100
    assert set(result.replica[late].tolist()) == {1}
    assert set(result.replica[: late[0]].tolist()) == {0, 1}
    assert not result.statuses
    assert max(result.end_ps) < 1e12 * (trace.duration_s + 60)
    # The other had all adapters before, and nobody is there any more to load them for.
    assert result.bytes_moved == 0


# -- as text -----------------------------------------------------------------------------------


def test_what_is_different_is_said_in_words() -> None:
    what_if = WhatIf.parse(add=["50x64", "2x8@20%"], scale=["a-*=2"], lose="1")
    assert what_if
    assert what_if.describe() == (
        "the requests of a-* times 2",
        "50 more adapters of rank 64, each with as many requests as the others have in the mean",
        "2 more adapters of rank 8, together with 20 % of the requests there are, on top",
        "1 replica lost for good, 33.3 % of the way into the trace",
    )
    assert not WhatIf()
    assert WhatIf().describe() == ()
    assert WhatIf.parse(lose="3@20s").describe() == ("3 replicas lost for good, 20 s into the trace",)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ("50", "'50'; expected such as 50x64, that is 50 adapters of rank 64, or 50x64@0.2"),
        ("50x", "expected such as 50x64"),
        ("50x64@", "expected such as 50x64"),
        ("-1x64", "expected such as 50x64"),
        ("0x64", "0x64: expected from 1 to 1,000,000 adapters"),
        ("5x0", "5x0: expected a rank from 1"),
        ("5x8@1001", "5x8@1001: expected a share from 0 to 1000"),
        ("1000000x8", "adds 80,000,000 requests; expected 50,000,000 at most in all"),
    ],
)
def test_an_addition_that_cannot_be_is_refused_in_one_line(add: str, message: str) -> None:
    with pytest.raises(BadInputError, match="--add-adapters: ") as refused:
        WhatIf.parse(add=[add]).apply(trace_of_columns(np.arange(80.0), 1, 1, 0, num_adapters=1), 0)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (["a00"], "'a00'; expected such as 'support-*=2'"),
        (["a00=x"], "expected such as 'support-*=2': names, and a factor from 0 to 1000"),
        (["a00=-1"], "expected such as"),
        (["a00=1001"], "expected such as"),
        (["=2"], "expected such as"),
        (["b*=2"], "'b*' has no requests; the trace's adapters are a00, the base model is base"),
        (["base=2"], "'base' has no requests"),
        (["*=0"], "leaves no requests"),
        (["*=1000", "a*=1000"], "makes 80,000,000 requests; expected 50,000,000 at most"),
    ],
)
def test_a_factor_that_cannot_be_is_refused_in_one_line(scale: list[str], message: str) -> None:
    with pytest.raises(BadInputError, match="--scale: ") as refused:
        WhatIf.parse(scale=scale).apply(trace_of_columns(np.arange(80.0), 1, 1, 0, num_adapters=1), 0)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        ("one", "'one'; expected such as 1, 1@100s or 1@30%"),
        ("1@", "expected such as"),
        ("1@30", "expected such as"),
        ("1@101%", "expected such as"),
        ("0", "0 of 4; expected from 1 to 3"),
        ("4", "4 of 4; expected from 1 to 3"),
        ("1@91s", "at 91 s; expected a time within the 90 s there are"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_in_one_line(lose: str, message: str) -> None:
    with pytest.raises(BadInputError, match="--lose: ") as refused:
        lost_replicas(lose, 4, 90.0)
    assert message in str(refused.value)


def test_one_replica_cannot_be_lost_and_no_traffic_has_no_mean() -> None:
    with pytest.raises(BadInputError, match="1 of 1; expected two replicas, to lose one"):
        lost_replicas("1", 1, 90.0)
    base_only = trace_of_columns(np.arange(9.0), 1, 1, -1)
    with pytest.raises(
        BadInputError, match=r"no adapter has requests to go by; expected a share, such as 5x8@0\.2"
    ):
        WhatIf.parse(add=["5x8"]).apply(base_only, 0)
    assert len(WhatIf.parse(add=["5x8@1"]).apply(base_only, 0)) == 18
