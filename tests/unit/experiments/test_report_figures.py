"""Figures over seeds, and what somebody published beside them."""

import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.experiments.report.aggregate import FIGURES, aggregate, spread_of
from loraserve.experiments.report.claims import ClaimFound, claims_found
from loraserve.experiments.results import ExperimentResult, Point
from loraserve.experiments.spec import ClaimSection
from tests.support.made_experiments import point_of, result_of

FIGURES_OF_CLAIMS = ("highest_rate", "fewest_replicas", "ttft_p95_ms")


def tree(**claim: Any) -> dict[str, Any]:
    return {
        "traces": [{"name": "u", "source": "preset:loraserve-uniform"}],
        "policies": ["loraserve", "slora-random"],
        "rates": ["0.5x"],
        "find": {"highest_rate": True, "fewest_replicas_at": [120.0], "most_replicas": 100},
        "claims": [{"text": "better", "policy": "loraserve", "over": "slora-random", **claim}],
    }


def found(result: ExperimentResult) -> ClaimFound:
    (one,) = claims_found(aggregate(result))
    return one


@given(st.lists(st.floats(0, 1e6) | st.just(math.inf), min_size=1))
def test_a_median_lies_between_the_least_and_the_most(values: list[float]) -> None:
    spread = spread_of(values)
    assert spread is not None
    assert spread.lowest <= spread.median <= spread.highest
    assert spread == spread_of(reversed(values))


def test_no_values_have_no_spread() -> None:
    assert spread_of([None, None]) is None


def test_a_latency_that_is_missing_is_infinite_only_where_requests_failed() -> None:
    read = FIGURES["ttft_p95_ms"].read
    assert read(point_of(1.0, 1, ttft_p95_ms=None, failed=100)) == math.inf
    assert read(point_of(1.0, 1, ttft_p95_ms=None, failed=0)) is None
    assert read(point_of(1.0, 1, ttft_p95_ms=5.0, failed=100)) == 5.0


def test_resident_bytes_are_per_replica() -> None:
    assert FIGURES["resident_bytes"].read(point_of(1.0, 4, resident_bytes=4.0 * 2**20 * 3)) == 3.0


def test_every_figure_of_a_claim_is_known() -> None:
    named = {one.name: one.type for one in msgspec.structs.fields(ClaimSection)}["figure"]
    of_runs = {*get_args(named)} - {"highest_rate", "fewest_replicas"}
    assert of_runs
    assert of_runs <= {*FIGURES}
    assert {*FIGURES} <= {one.name for one in msgspec.structs.fields(Point)}


def test_seeds_become_their_median_with_the_least_and_the_most() -> None:
    capacities = {0: 0.5, 1: 0.9, 2: 0.6}
    data = aggregate(
        result_of(
            {**tree(figure="highest_rate"), "seeds": [0, 1, 2], "replicas": [1]},
            lambda _trace, _policy, _kernel, seed: capacities[seed],
        )
    )
    (setting,) = data.runs()
    curve = data.curve("u", setting, "loraserve")
    assert curve is not None
    assert curve.highest == spread_of([5.0, 6.0, 9.0])
    (search,) = data.searches()
    searched = data.curve("u", search, "loraserve")
    assert searched is not None
    assert searched.fewest[0].replicas == spread_of([24.0, 20.0, 14.0])
    assert searched.fewest[0].held[100] == (3, 3)
    assert searched.fewest[0].held[20] == (1, 1)
    assert searched.fewest[0].held[13] == (0, 1)


@pytest.mark.parametrize("figure", FIGURES_OF_CLAIMS)
@pytest.mark.parametrize(("better", "ratio"), [("loraserve", 2.0), ("slora-random", 0.5)])
def test_better_is_above_one_for_every_figure(figure: str, better: str, ratio: float) -> None:
    capacities = {"loraserve": 0.4, "slora-random": 0.4, better: 0.8}
    best = found(result_of(tree(figure=figure), lambda _t, policy, _k, _s: capacities[policy])).best
    assert best is not None
    assert best.value is not None
    assert best.value.median == pytest.approx(ratio)
    assert not best.is_bound


def test_a_ratio_is_taken_seed_by_seed() -> None:
    # The ratio of the medians would be 1.
    capacities = {"loraserve": (0.2, 0.4, 0.8), "slora-random": (0.8, 0.2, 0.4)}
    result = result_of(
        {**tree(figure="highest_rate"), "seeds": [0, 1, 2]},
        lambda _t, policy, _k, seed: capacities[policy][seed],
    )
    best = found(result).best
    assert best is not None
    assert best.value is not None
    assert (best.value.lowest, best.value.median, best.value.highest) == pytest.approx((0.25, 2.0, 2.0))


@pytest.mark.parametrize(
    ("paper", "ratio", "verdict", "reached"),
    [
        (2.0, 2.0, "reached: 2.00, published 2", True),
        (2.0, 1.4, "not reached: 1.40 of 2 at most", False),
        (2.0, 1.996, "reached: 2.00, published 2", True),
        (None, 1.4, "up to 1.40", None),
    ],
)
def test_a_verdict_says_it_in_words(
    paper: float | None, ratio: float, verdict: str, reached: bool | None
) -> None:
    result = result_of(
        tree(figure="highest_rate", paper=paper),
        lambda _t, policy, _k, _s: 0.4 * ratio if policy == "loraserve" else 0.4,
    )
    assert (found(result).verdict, found(result).is_reached) == (verdict, reached)


def test_a_verdict_says_where_seeds_disagree() -> None:
    ratios = (1.5, 2.1, 3.0)
    result = result_of(
        {**tree(figure="highest_rate", paper=2.0), "seeds": [0, 1, 2]},
        lambda _t, policy, _k, seed: 0.2 * ratios[seed] if policy == "loraserve" else 0.2,
    )
    assert found(result).verdict == "reached: 2.10, published 2; seeds from 1.50 to 3.00"


@pytest.mark.parametrize(
    ("figure", "note"),
    [
        ("highest_rate", "loraserve never inside the SLO"),
        ("fewest_replicas", "loraserve not inside the SLO on 100 replicas"),
        ("ttft_p95_ms", "loraserve has no finite TTFT p95"),
    ],
)
def test_a_policy_that_never_holds_has_no_ratio(figure: str, note: str) -> None:
    result = result_of(
        tree(figure=figure, paper=2.0), lambda _t, policy, _k, _s: 0.0 if policy == "loraserve" else 0.5
    )
    one = found(result)
    assert (one.best, one.typical, one.is_reached) == (None, None, None)
    assert one.verdict == f"no figure: {note}"


@pytest.mark.parametrize(
    ("figure", "least"),
    # It failed at 0.02 of the fluid rate, and on 100 replicas where 24 are enough.
    [("highest_rate", 0.5 / 0.02), ("fewest_replicas", 101 / 24)],
)
def test_one_that_never_holds_gives_the_other_at_least_a_bound(figure: str, least: float) -> None:
    result = result_of(
        tree(figure=figure, paper=2.0), lambda _t, policy, _k, _s: 0.5 if policy == "loraserve" else 0.0
    )
    one = found(result)
    assert one.best is not None
    assert one.best.value is not None
    assert one.best.is_bound
    assert one.best.value.median == pytest.approx(least)
    assert one.verdict.startswith("reached: at least ")


def test_a_bound_below_what_was_published_decides_nothing() -> None:
    result = result_of(
        tree(figure="fewest_replicas", paper=2.0),
        lambda _t, policy, _k, _s: 0.15 if policy == "loraserve" else 0.0,
    )
    assert found(result).verdict == "not shown: at least 1.26, published 2; more was not tried"
    assert found(result).is_reached is None


def test_an_endless_latency_of_the_other_is_no_ratio() -> None:
    result = result_of(
        tree(figure="ttft_p95_ms"), lambda _t, policy, _k, _s: 0.5 if policy == "loraserve" else 0.0
    )
    assert found(result).verdict == "no figure: slora-random has no finite TTFT p95"


@pytest.mark.parametrize(
    ("figure", "note"),
    [
        ("highest_rate", "neither ever inside the SLO"),
        ("fewest_replicas", "neither inside the SLO on 100 replicas"),
        ("ttft_p95_ms", "neither has a finite TTFT p95"),
    ],
)
def test_neither_holding_is_said_of_both(figure: str, note: str) -> None:
    assert found(result_of(tree(figure=figure), lambda *_: 0.0)).verdict == f"no figure: {note}"


def test_a_seed_without_a_ratio_is_said_and_left_out() -> None:
    result = result_of(
        {**tree(figure="ttft_p95_ms"), "seeds": [0, 1, 2]},
        lambda _t, policy, _k, seed: 0.0 if policy == "slora-random" and seed == 1 else 0.5,
    )
    (case,) = found(result).cases
    assert case.value == spread_of([1.0, 1.0])
    assert case.note == "slora-random has no finite TTFT p95 in 1 seed of 3"


def test_a_claim_without_another_policy_is_about_the_figure_itself() -> None:
    rate = found(result_of(tree(figure="highest_rate", over="", paper=30.0), lambda *_: 0.8))
    assert (rate.verdict, rate.unit) == ("reached: 32.0, published 30", "req/s")
    late = found(result_of(tree(figure="ttft_p95_ms", over="", paper=90.0), lambda *_: 0.5))
    assert late.verdict == "not reached: 100 of 90 at best"


def test_a_claim_is_about_the_traces_kernels_and_rate_that_it_names() -> None:
    wide = {
        **tree(figure="ttft_p95_ms", traces=["w"], kernels=["sum"], rate="0.4x"),
        "traces": [{"name": name, "source": "preset:loraserve-uniform"} for name in ("u", "w")],
        "kernels": ["sum", "padded_batch"],
        "rates": ["0.4x", "0.5x"],
    }
    (case,) = found(result_of(wide, lambda *_: 0.5)).cases
    assert (case.trace, case.setting.kernel, case.rate) == ("w", "sum", "0.4x (16/s)")
    never_searched = {**tree(figure="highest_rate"), "find": {}}
    assert found(result_of(never_searched, lambda *_: 0.5)).verdict == "no figure: not run"


def test_up_to_is_the_best_case_and_the_middle_one_the_median() -> None:
    capacities = {"a": 0.5, "b": 0.6, "c": 0.9}
    wide = {
        **tree(figure="highest_rate"),
        "traces": [{"name": name, "source": "preset:loraserve-uniform"} for name in capacities],
    }
    one = found(result_of(wide, lambda t, policy, _k, _s: capacities[t] if policy == "loraserve" else 0.5))
    assert one.best is not None
    assert one.best.trace == "c"
    assert one.typical == pytest.approx(1.2)
