"""Lengths: the figures of their laws, pairs kept together, limits held."""

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from traces.columns import TraceColumns
from traces.synthesis.lengths import (
    LENGTHS,
    Azure,
    Band,
    Banded,
    Fitted,
    FittedLognormal,
    Fixed,
    InOrder,
    Lengths,
    Limits,
    Lognormal,
    Over,
    Production,
    Resampled,
    UniformLengths,
    azure_conversation,
    fit_banded,
    fit_lognormal,
)
from traces.synthesis.portable import Floats, stream
from traces.types import TraceError

AZURE_TRACE = Path(__file__).parents[4] / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv.gz"


def workload(prompts: list[int], outputs: list[int]) -> TraceColumns:
    return TraceColumns(
        arrival_s=np.arange(len(prompts), dtype=np.float64),
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        adapter=np.full(len(prompts), -1, dtype=np.int32),
        adapters=(),
        source="made",
        format="made",
    )


SMALL = workload([5, 900, 70, 30, 8], [50, 9, 0, 3, 2000])


def load(path: str) -> TraceColumns:
    return SMALL


def pairs(law: Lengths, count: int = 50_000, limits: Limits | None = None, seed: int = 1) -> Floats:
    return law.pairs(count, stream(seed, 3), load, limits or Limits())


LAWS: list[Lengths] = [
    Azure(),
    Production(),
    Fixed(prompt_tokens=20, output_tokens=4),
    UniformLengths(prompt_low=1),
    Lognormal(log_correlation=-0.5),
    Fitted(path="x", bands=2),
    FittedLognormal(path="x"),
    Resampled(path="x"),
    InOrder(path="x"),
]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(LAWS),
    st.integers(1, 400),
    st.sampled_from([700, 1024]),
    st.sampled_from([60, 256]),
    st.sampled_from(["clip", "redraw"]),
    st.integers(0, 2**40),
)
def test_limits_hold_under_every_law(
    law: Lengths, count: int, max_prompt: int, max_output: int, over: Over, seed: int
) -> None:
    limits = Limits(max_prompt_tokens=max_prompt, max_output_tokens=max_output, over=over)
    drawn = pairs(law, count, limits, seed)
    assert drawn.shape == (2, count)
    assert np.array_equal(drawn, np.rint(drawn))
    assert np.all(drawn >= 1)
    assert np.all(drawn[0] <= max_prompt)
    assert np.all(drawn[1] <= max_output)
    assert np.array_equal(drawn, pairs(law, count, limits, seed))


def test_the_laws_of_text_are_all_tested() -> None:
    assert {type(law) for law in LAWS} == set(LENGTHS.values())


def test_redrawing_leaves_no_heap_at_the_limit() -> None:
    law = Lognormal(prompt_median=100.0, prompt_sigma=1.0)
    clipped = pairs(law, limits=Limits(max_prompt_tokens=100))[0]
    redrawn = pairs(law, limits=Limits(max_prompt_tokens=100, over="redraw"))[0]
    assert np.mean(clipped == 100) == pytest.approx(0.5, abs=0.02)
    assert np.mean(redrawn == 100) < 0.02
    assert np.median(redrawn) == pytest.approx(100 * math.exp(stats.norm.ppf(0.25)), rel=0.03)


def test_lognormal_lengths_have_their_median_spread_and_correlation() -> None:
    law = Lognormal(
        prompt_median=3_000.0, prompt_sigma=0.6, output_median=900.0, output_sigma=0.9, log_correlation=0.7
    )
    logs = np.log(pairs(law))
    assert np.exp(np.median(logs, axis=1)) == pytest.approx([3_000, 900], rel=0.02)
    assert np.std(logs, axis=1) == pytest.approx([0.6, 0.9], rel=0.02)
    assert np.corrcoef(logs)[0, 1] == pytest.approx(0.7, abs=0.01)
    drawn = pairs(law).astype(int)
    fitted = fit_lognormal(workload(drawn[0].tolist(), drawn[1].tolist()))
    assert fitted.prompt_median == pytest.approx(3_000, rel=0.02)
    assert fitted.output_sigma == pytest.approx(0.9, rel=0.02)
    assert fitted.log_correlation == pytest.approx(0.7, abs=0.01)


def test_uniform_and_fixed_lengths() -> None:
    drawn = pairs(UniformLengths(prompt_low=3, prompt_high=5, output_low=2, output_high=2))
    assert np.unique(drawn[0]).tolist() == [3, 4, 5]
    assert np.mean(drawn[0]) == pytest.approx(4, abs=0.02)
    assert np.unique(drawn[1]).tolist() == [2]
    assert pairs(Fixed(prompt_tokens=7, output_tokens=9), 2).tolist() == [[7, 7], [9, 9]]


def test_a_trace_s_pairs_stay_together() -> None:
    """The request without an output was never served and is left out."""
    served = {(5, 50), (900, 9), (30, 3), (8, 2000)}
    drawn = pairs(Resampled(path="x"), 1_000)
    assert set(zip(*drawn.astype(int).tolist(), strict=True)) == served
    assert pairs(InOrder(path="x"), 6).tolist() == [[5, 900, 30, 8, 5, 900], [50, 9, 3, 2000, 50, 9]]
    limits = Limits(max_output_tokens=100, over="redraw")
    assert pairs(InOrder(path="x"), 4, limits).tolist() == [[5, 900, 30, 5], [50, 9, 3, 50]]


def test_a_fitted_table_keeps_how_outputs_go_with_prompts() -> None:
    """Short prompts with long outputs, long prompts with short ones: no correlation alone tells so."""
    prompts = [*range(10, 110), *range(1_000, 1_100)]
    outputs = [500] * 100 + [20] * 100
    drawn = fit_banded(workload(prompts, outputs), bands=2).pairs(5_000, stream(1, 3), load, Limits())
    is_short = drawn[0] < 500
    assert np.mean(is_short) == pytest.approx(0.5, abs=0.03)
    assert np.all(drawn[1][is_short] == 500)
    assert np.all(drawn[1][~is_short] == 20)


def test_production_lengths_have_the_published_figures() -> None:
    prompts, outputs = pairs(Production())
    assert (prompts.min(), prompts.max()) == (330, 1020)
    assert prompts.mean() == pytest.approx(730, abs=10)
    assert (outputs.min(), outputs.max()) == (52, 250)
    assert 52 <= stats.mode(outputs).mode <= 57


@pytest.mark.skipif(not AZURE_TRACE.exists(), reason="no shared traces beside the checkout")
def test_azure_lengths_are_near_the_trace_s() -> None:
    rows = gzip.decompress(AZURE_TRACE.read_bytes()).decode().split()
    real = np.array([[int(field) for field in row.split(",")[1:]] for row in rows[2::2]]).T
    assert sum(band.weight for band in azure_conversation().bands) == real.shape[1] == 19_366
    drawn = pairs(Azure(), 100_000)
    for ours, theirs in zip(drawn, real, strict=True):
        assert stats.ks_2samp(ours, theirs).statistic < 0.02
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.02)
    # LoRAServe keeps the requests within its limits and draws from those.
    limits = Limits(max_prompt_tokens=1024, max_output_tokens=256, over="redraw")
    kept = real[:, (real[0] <= 1024) & (real[1] <= 256)]
    for ours, theirs in zip(pairs(Azure(), 100_000, limits), kept, strict=True):
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.02)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Limits(max_prompt_tokens=0), "the limit of prompt tokens is 0"),
        (lambda: Limits(over="cut"), "cannot be 'cut'; expected clip or redraw"),  # type: ignore[arg-type]
        (lambda: Fixed(prompt_tokens=0), "prompt_tokens of fixed lengths is 0"),
        (lambda: UniformLengths(prompt_low=9, prompt_high=3), "prompt_high of uniform lengths is 3"),
        (lambda: Lognormal(output_sigma=math.nan), "output_sigma of lognormal lengths is nan"),
        (
            lambda: pairs(Fixed(), 5, Limits(max_prompt_tokens=8, over="redraw")),
            "hardly any lengths within the limits can be drawn",
        ),
        (
            lambda: pairs(Resampled(path="x"), 5, Limits(max_prompt_tokens=2, over="redraw")),
            "x: no request is within the limits",
        ),
        (lambda: fit_lognormal(workload([1], [0])), "made: no request has a prompt and an output"),
        (lambda: fit_banded(SMALL, bands=0), "bands of fitted lengths is 0"),
        (lambda: Banded(levels=(0.0, 0.5), bands=()), "levels of a length table must rise from 0 to 1"),
        (lambda: Banded(levels=(0.0, 1.0), bands=()), "needs a band with a weight above 0"),
        (
            lambda: Banded(
                levels=(0.0, 1.0), bands=(Band(weight=1.0, prompt_tokens=(9, 3), output_tokens=(1, 2)),)
            ),
            "they must not fall",
        ),
    ],
)
def test_impossible_lengths_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        make()
