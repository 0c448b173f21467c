"""What `bench rank` makes of its measurements: figures, and the plot."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.bench.rank_figures import AT_LEAST, AT_MOST, FORMULAS, Spread, figures, spread, verdict
from loraserve.bench.rank_plot import draw

RANKS = (8, 128)
TIMES = {
    "off": {
        "prefill_base": 50.0,
        "prefill_base_batch": 52.0,
        "prefill_base_part": 30.0,
        "decode_base": 16.0,
        "decode_base_part": 14.0,
    },
    "rank-true": {
        "prefill_base": 51.0,
        "prefill_r8": 60.0,
        "prefill_r128": 80.0,
        "prefill_mixed": 82.0,
        "prefill_low_part": 36.0,
        "prefill_high_part": 44.0,
        "decode_base": 16.0,
        "decode_r8": 20.0,
        "decode_mixed": 25.0,
        "decode_low_part": 17.0,
        "decode_high_part": 19.0,
    },
    "padded": {"prefill_r8": 90.0, "prefill_r128": 90.0, "decode_r8": 24.0},
    "stock": {"prefill_r8": 6000.0, "prefill_r128": 6400.0, "decode_r8": 100.0},
}


def test_the_figures_follow_their_formulas() -> None:
    found = figures(TIMES, RANKS)
    expected = {
        "prefill_ratio_r8": 6000 / 60,
        "prefill_ratio_r128": 6400 / 80,
        "decode_ratio_r8": 100 / 20,
        "prefill_over_padded_r8": (90 - 50) / (60 - 50),
        "prefill_over_padded_r128": (90 - 50) / (80 - 50),
        "decode_over_padded_r8": (24 - 16) / (20 - 16),
        "prefill_step_over_padded_r8": 90 / 60,
        "prefill_over_no_lora_r128": 80 / 50,
        "decode_over_no_lora_r8": 20 / 16,
        "base_over_no_lora_prefill": 51 / 50,
        "base_over_no_lora_decode": 1.0,
        "mixed_over_sum_prefill": (82 - 52) / ((36 - 30) + (44 - 30)),
        "mixed_step_over_sum_prefill": 82 / (52 + 6 + 14),
        # Eight sequences decode in one step whether their prompts came together or not.
        "mixed_over_sum_decode": (25 - 16) / ((17 - 14) + (19 - 14)),
        "mixed_step_over_sum_decode": 25 / (16 + 3 + 5),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert found["decode_ratio_r128"] is None


def test_every_figure_has_a_formula_and_every_target_a_figure() -> None:
    names = figures(TIMES, RANKS).keys()
    templates = {re.sub(r"prefill|decode", "KIND", re.sub(r"_r\d+$", "_rR", name)) for name in names}
    assert templates == FORMULAS.keys()
    assert AT_LEAST.keys() | AT_MOST.keys() <= names


def test_an_addition_that_is_lost_in_the_noise_divides_nothing() -> None:
    times = TIMES | {"rank-true": TIMES["rank-true"] | {"prefill_r8": 49.0, "prefill_low_part": 10.0}}
    found = figures(times, RANKS)
    assert found["prefill_over_padded_r8"] is None
    assert found["mixed_over_sum_prefill"] is None
    assert found["prefill_ratio_r8"] == pytest.approx(6000 / 49, abs=1e-4)


@pytest.mark.parametrize("mode", TIMES)
def test_a_mode_that_was_left_out_leaves_its_figures_empty(mode: str) -> None:
    whole = figures(TIMES, RANKS)
    found = figures({name: rows for name, rows in TIMES.items() if name != mode}, RANKS)
    assert found.keys() == whole.keys()
    assert all(value in (None, whole[key]) for key, value in found.items())
    assert found != whole


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("prefill_ratio_r8", 50.0, "≥ 50 met"),
        ("prefill_ratio_r8", 49.9, "≥ 50 MISSED"),
        ("decode_over_no_lora_r8", 1.5, "≤ 1.5 met"),
        ("decode_over_no_lora_r8", 1.6, "≤ 1.5 MISSED"),
        ("mixed_over_sum_decode", None, "≤ 1.15 not measured"),
        ("decode_ratio_r128", 1.0, ""),
    ],
)
def test_a_target_says_whether_it_is_met(key: str, value: float | None, says: str) -> None:
    assert verdict(key, value) == says


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30))
def test_a_spread_holds_half_of_the_repetitions(samples_ms: list[float]) -> None:
    found = spread(samples_ms)
    assert found.samples == len(samples_ms)
    assert min(samples_ms) <= found.p25_ms <= found.median_ms <= found.p75_ms <= max(samples_ms)
    inside = sum(found.p25_ms <= one <= found.p75_ms for one in samples_ms)
    assert 2 * inside >= len(samples_ms) - 2


def test_no_repetitions_have_no_spread() -> None:
    with pytest.raises(ValueError, match="no repetitions"):
        spread([])


def test_the_plot_is_the_same_for_the_same_run_and_draws_what_there_is() -> None:
    times = {
        mode: {row: Spread(median_ms=ms, p25_ms=0.9 * ms, p75_ms=ms, samples=3) for row, ms in rows.items()}
        for mode, rows in TIMES.items()
    }
    svg = draw(times, RANKS, "svg")
    assert svg == draw(times, RANKS, "svg")
    assert b"vLLM's own" in svg
    assert b"vLLM's own" not in draw({"off": times["off"]}, RANKS, "svg")
    assert draw(times, RANKS, "png").startswith(b"\x89PNG")
