"""Which figures two runs are compared by, and how far apart they are."""

import math

import pytest

from loraserve.fidelity.figures import (
    KINDS,
    arriving_tokens_per_s,
    compare,
    figures_of,
    relative_error,
)
from loraserve.fidelity.options import Targets
from traces.records import Outcome, RequestRecord


def record(index: int, arrival_s: float, times_s: tuple[float, ...]) -> RequestRecord:
    return RequestRecord(
        index=index,
        request_id=f"r{index}",
        adapter=None,
        rank=None,
        scheduled_s=arrival_s,
        sent_s=arrival_s,
        end_s=times_s[-1],
        prompt_tokens=10,
        output_tokens=len(times_s),
        expected_output_tokens=len(times_s),
        outcome=Outcome.OK,
        message_times_s=times_s,
        message_tokens=(1,) * len(times_s),
    )


RECORDS = (
    record(0, 0.0, (0.1, 0.2, 0.4)),
    record(1, 1.0, (1.3, 1.4)),
    record(2, 2.0, (2.2, 3.2, 4.0)),
)


def test_figures_are_those_of_the_metrics() -> None:
    figures = figures_of(RECORDS)
    assert figures.requests_per_s == pytest.approx(3 / 4)
    assert figures.tokens_per_s == pytest.approx(8 / 4)
    assert figures.ttft_p50_ms == pytest.approx(200)
    assert figures.ttft_p95_ms == pytest.approx(290)
    assert figures.tbt_p50_ms == pytest.approx(200)


def test_tokens_that_come_after_the_last_arrival_do_not_count_while_requests_come() -> None:
    assert arriving_tokens_per_s(RECORDS) == pytest.approx(5 / 2)
    assert arriving_tokens_per_s(RECORDS, from_s=1.0) == pytest.approx(2 / 1)
    assert math.isnan(arriving_tokens_per_s(RECORDS, from_s=2.0))
    assert math.isnan(arriving_tokens_per_s(()))


def test_each_figure_is_held_against_the_target_of_its_kind() -> None:
    slower = RECORDS[:2]
    targets = Targets(throughput=None, p50=0.0, p95=10.0)
    by_name = {one.name: one for one in compare(RECORDS, [slower, slower, RECORDS], targets)}
    assert by_name.keys() == KINDS.keys()
    assert by_name["requests_per_s"].met is None
    assert by_name["ttft_p95_ms"].met is True
    assert by_name["tbt_p50_ms"].error == pytest.approx(100 / 200 - 1)
    assert by_name["tbt_p50_ms"].met is False
    assert by_name["tbt_p50_ms"].level == pytest.approx(2 / 5)
    assert by_name["tokens_per_s"].level is None
    assert all(one.error == 0 and one.met for one in compare(RECORDS, [RECORDS], Targets()))


@pytest.mark.parametrize(
    ("live", "simulated", "error"),
    [
        (10.0, 11.0, 0.1),
        (10.0, 9.0, -0.1),
        (math.inf, math.inf, 0.0),
        (math.nan, math.nan, 0.0),
        (10.0, math.inf, math.inf),
        (math.nan, 1.0, math.inf),
        (0.0, 1.0, math.inf),
    ],
)
def test_errors_are_relative_to_the_live_run(live: float, simulated: float, error: float) -> None:
    assert relative_error(live, simulated) == pytest.approx(error)
