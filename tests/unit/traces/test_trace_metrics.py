"""Every figure agrees with its formula, worked by hand."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import (
    Outcome,
    RequestRecord,
    Slo,
    Trace,
    TraceError,
    TraceRequest,
    formulas,
    pacing_stats,
    percentile,
    read_records,
    schedule,
    summarise,
    summary_to_json,
    write_records,
)
from traces.metrics import attains, e2el_ms, itl_ms, tpot_ms, ttft_from_send_ms, ttft_ms
from traces.quantiles import Distribution


def record(
    times_s: Sequence[float] = (1.1, 1.15, 1.25),
    *,
    index: int = 0,
    scheduled_s: float = 1.0,
    outcome: Outcome = Outcome.OK,
    adapter: str | None = "a",
    rank: int | None = 8,
    tokens: Sequence[int] = (),
) -> RequestRecord:
    counts = tuple(tokens) or (1,) * len(times_s)
    return RequestRecord(
        index=index,
        request_id=f"r-{index}",
        adapter=adapter,
        rank=rank,
        scheduled_s=scheduled_s,
        sent_s=scheduled_s + 0.002,
        end_s=times_s[-1] if times_s else scheduled_s + 0.01,
        prompt_tokens=10,
        output_tokens=sum(counts),
        expected_output_tokens=3,
        outcome=outcome,
        message_times_s=tuple(times_s),
        message_tokens=counts,
    )


def approx(*values: float) -> object:
    return pytest.approx(list(values))


def test_the_latencies_of_one_request() -> None:
    one = record()
    assert ttft_ms(one) == pytest.approx(100)
    assert ttft_from_send_ms(one) == pytest.approx(98)
    assert e2el_ms(one) == pytest.approx(250)
    assert tpot_ms(one) == pytest.approx(75)
    assert itl_ms(one) == approx(50, 100)


def test_a_message_of_several_tokens_is_one_gap_but_counts_in_tpot() -> None:
    one = record(times_s=(1.1, 1.4), tokens=(1, 3))
    assert itl_ms(one) == approx(300)
    assert tpot_ms(one) == pytest.approx(100)
    assert summarise([one]).overall.tokens_per_message == 2


def test_a_request_of_one_token_has_no_tpot_and_no_gap() -> None:
    one = record(times_s=(1.1,))
    assert tpot_ms(one) is None
    assert itl_ms(one) == []
    assert attains(one, Slo())


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_a_request_that_did_not_complete_has_infinite_latency(outcome: Outcome) -> None:
    broken, never = record(outcome=outcome), record(times_s=(), outcome=outcome)
    for one in (broken, never):
        assert [ttft_ms(one), ttft_from_send_ms(one), e2el_ms(one), tpot_ms(one)] == [math.inf] * 4
        assert not attains(one, Slo(ttft_ms=1e9, tbt_ms=1e9))
    assert itl_ms(broken) == approx(50, 100, math.inf)
    assert itl_ms(never) == []


def test_a_completed_request_without_a_token_never_answered() -> None:
    assert ttft_ms(record(times_s=())) == math.inf
    assert not attains(record(times_s=()), Slo())


@pytest.mark.parametrize(
    ("slo", "inside"),
    [
        (Slo(ttft_ms=101, tbt_ms=101), True),
        (Slo(ttft_ms=99, tbt_ms=101), False),
        # The 95th percentile of 50 and 100 is 97.5.
        (Slo(ttft_ms=101, tbt_ms=98), True),
        (Slo(ttft_ms=101, tbt_ms=97), False),
    ],
)
def test_a_request_attains_only_inside_every_target(slo: Slo, inside: bool) -> None:
    assert attains(record(), slo) is inside


def test_an_slo_that_nobody_can_meet_is_refused() -> None:
    with pytest.raises(TraceError, match="ttft_ms = 0"):
        Slo(ttft_ms=0)


def run() -> list[RequestRecord]:
    """Four measured requests over 4 s, one of them refused and one slow, after one of warm-up."""
    return [
        replace(record(index=0, scheduled_s=0.0, times_s=(0.9, 0.95)), warmup=True),
        record(index=1, scheduled_s=1.0, times_s=(1.1, 1.2, 1.3)),
        record(index=2, scheduled_s=2.0, times_s=(2.2, 2.3), adapter="b", rank=64),
        record(index=3, scheduled_s=3.0, times_s=(), outcome=Outcome.REFUSED, adapter="b", rank=64),
        record(index=4, scheduled_s=1.5, times_s=(4.5, 5.0), adapter=None, rank=None),
    ]


def test_the_rates_of_a_run() -> None:
    summary = summarise(run())
    overall = summary.overall
    assert summary.duration_s == 4.0
    assert summary.warmup_requests == 1
    assert (overall.requests, overall.completed) == (4, 3)
    assert overall.outcomes == {Outcome.OK: 3, Outcome.REFUSED: 1}
    assert (overall.total_input_tokens, overall.total_output_tokens) == (30, 7)
    assert overall.request_throughput == 0.75
    assert overall.output_throughput == 1.75
    assert overall.total_token_throughput == 9.25
    assert overall.attainment == 0.5
    assert overall.request_goodput == 0.5
    assert not overall.slo_met


def test_percentiles_run_over_all_offered_requests() -> None:
    overall = summarise(run()).overall
    # TTFT 100, 200, 3000 and infinite: the median lies between the second and the third.
    assert overall.ttft_ms.median == pytest.approx(1600)
    assert (overall.ttft_ms.mean, overall.ttft_ms.p95, overall.ttft_ms.p99) == (math.inf,) * 3
    assert overall.ttft_ms.count == 4
    # Gaps 100, 100, 100 and 500 ms: the refused request adds none.
    assert overall.itl_ms.count == 4
    assert overall.itl_ms.mean == pytest.approx(200)
    assert overall.itl_ms.p95 == pytest.approx(440)


def test_groups_are_by_rank_in_order_and_by_adapter_by_popularity() -> None:
    records = [
        *run(),
        record(index=5, rank=None, adapter="mystery"),
        record(index=6, rank=128, adapter="c"),
        record(index=7, rank=128, adapter="c"),
    ]
    summary = summarise(records)
    assert list(summary.per_rank) == ["base", "8", "64", "128", "unknown"]
    assert list(summary.per_adapter) == ["b", "c", "a", "mystery"]
    assert summary.per_rank["8"].attainment == 1.0
    assert summary.per_rank["8"].slo_met
    assert sum(group.requests for group in summary.per_rank.values()) == summary.overall.requests
    assert sum(group.request_goodput for group in summary.per_rank.values()) == pytest.approx(
        summary.overall.request_goodput
    )


def test_a_run_of_nothing_has_no_figures() -> None:
    for records in ([], [replace(record(), warmup=True)]):
        summary = summarise(records)
        assert (summary.overall.requests, summary.overall.attainment, summary.void) == (0, None, False)
        assert summary.overall.ttft_ms == Distribution(count=0, mean=None, median=None, p95=None, p99=None)
        assert summary.overall.request_throughput == 0
        assert not summary.overall.slo_met


def test_a_late_client_makes_a_live_run_void() -> None:
    on_time, late = run(), [replace(one, sent_s=one.scheduled_s + 0.02) for one in run()]
    assert not summarise(on_time).void
    assert summarise(on_time).pacing == pacing_stats(on_time[1:])
    assert "p99 is 20.0 ms, above 10 ms" in summarise(late).void_reason
    simulated = summarise(late, live=False)
    assert (simulated.void, simulated.pacing) == (False, None)


def test_pacing_counts_early_and_late_alike() -> None:
    stats = pacing_stats(
        [replace(record(), sent_s=1.0 + error_s) for error_s in (0.004, -0.002, 0.0, 0.001, 0.003)]
    )
    assert stats.requests == 5
    assert [stats.p50_ms, stats.p99_ms, stats.max_ms] == approx(2, 3.96, 4)


def test_a_schedule_keeps_the_order_and_divides_time() -> None:
    trace = Trace.of(
        [
            TraceRequest(index=0, arrival_s=arrival_s, prompt_tokens=1, output_tokens=1)
            for arrival_s in (3, 5, 4)
        ],
        source="",
        format="",
    )
    assert [due_s for due_s, _ in schedule(trace)] == [0, 1, 2]
    assert [due_s for due_s, _ in schedule(trace, 4)] == [0, 0.25, 0.5]
    assert tuple(request for _, request in schedule(trace, 4)) == trace.requests
    for speedup in (0, -1, math.inf, math.nan):
        with pytest.raises(TraceError, match="a number above 0"):
            schedule(trace, speedup)


def test_json_has_the_keys_of_vllm_bench_serve_and_no_infinity() -> None:
    tree = json.loads(json.dumps(summary_to_json(summarise(run())), allow_nan=False))
    overall = tree["overall"]
    rates = {"request_throughput", "request_goodput", "output_throughput", "total_token_throughput"}
    latencies = {
        f"{name}_{kind}_ms"
        for name in ("mean", "median", "p95", "p99")
        for kind in ("ttft", "tpot", "itl", "e2el", "ttft_from_send")
    }
    counts = {
        "completed",
        "refused",
        "failed",
        "truncated",
        "cancelled",
        "total_input_tokens",
        "total_output_tokens",
    }
    assert set(overall) >= rates | latencies | counts
    assert (overall["p99_ttft_ms"], overall["refused"], overall["failed"]) == ("inf", 1, 0)
    assert set(tree["per_rank"]) == {"base", "8", "64"}
    assert set(tree["per_adapter"]) == {"a", "b"}
    assert tree["per_rank"]["8"].keys() == overall.keys()
    assert summary_to_json(summarise([]))["overall"]["p99_ttft_ms"] is None
    assert tree["pacing"]["p99_ms"] == pytest.approx(2.0)


def test_every_latency_has_its_formula() -> None:
    assert {"TTFT", "TTFT from send", "TBT / ITL", "TPOT", "E2E", "attainment", "goodput"} <= set(formulas())


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(sample: list[float], percent: float) -> None:
    numpy = pytest.importorskip("numpy")
    assert percentile(sorted(sample), percent) == pytest.approx(float(numpy.percentile(sample, percent)))


@given(st.lists(st.floats(0, 1e6) | st.just(math.inf), max_size=40), st.floats(0, 100))
def test_a_percentile_is_never_nan(sample: list[float], percent: float) -> None:
    value = percentile(sorted(sample), percent)
    assert (value is None) == (not sample)
    assert value is None or min(sample) * (1 - 1e-9) <= value


def test_records_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = (*run(), replace(record(), status="naïve \u2028 «\n»", replica_id="r-0", adapter_version="a@0"))
    write_records(path, records)
    assert read_records(path) == records
    assert len(path.read_text().splitlines()) == len(records)


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"outcome": "lost"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(TraceError, match=r"records\.jsonl:2: not a request record"):
        read_records(path)


def test_messages_and_their_tokens_must_pair_up() -> None:
    with pytest.raises(TraceError, match="3 message times but 1 token counts"):
        replace(record(), message_tokens=(3,))
