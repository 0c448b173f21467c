"""Popularity, drift and ranks: shares as the laws say, at the start and as they change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from traces.columns import TraceAdapter
from traces.synthesis.drift import DRIFTS, Drift, Rotate, Run, Shuffle, Slide, Still, Swap, Walk
from traces.synthesis.popularity import (
    POPULARITY,
    Blocks,
    ByRank,
    FromFile,
    Geometric,
    Pareto,
    Popularity,
    Power,
    RankPower,
    RankShares,
    Stretched,
    Uniform,
    Weights,
    Zipf,
    choose,
)
from traces.synthesis.portable import Floats, apportion, shares, stream
from traces.synthesis.ranks import (
    RANKS,
    AdaptersOfFile,
    DrawnRanks,
    EqualRanks,
    NamedAdapters,
    PowerRanks,
    Ranks,
    WeightedRanks,
    lay_out,
)
from traces.types import TraceError

SHARED = Path(__file__).parents[4] / "shared" / "traces"
TEN = (8, 8, 16, 16, 32, 32, 64, 64, 128, 128)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (Uniform(), [0.25, 0.25, 0.25, 0.25]),
        (Zipf(exponent=1.0), [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        (Zipf(exponent=0.0), [0.25, 0.25, 0.25, 0.25]),
        (Power(alpha=0.5), np.diff(np.sqrt([0, 0.25, 0.5, 0.75, 1])).tolist()),
        (Power(alpha=2.0), [1 / 16, 3 / 16, 5 / 16, 7 / 16]),
        (Geometric(ratio=2.0), [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
        (Weights(values=(1.0, 0.0, 3.0, 4.0)), [1 / 8, 0, 3 / 8, 4 / 8]),
        (Blocks(functions=6, stride=2, exponent=0.0), [2 / 6, 2 / 6, 2 / 6, 0.0]),
        (Blocks(functions=10, stride=2, exponent=0.0), [4 / 10, 2 / 10, 2 / 10, 2 / 10]),
    ],
)
def test_each_law_weighs_its_places(law: Popularity, expected: list[float]) -> None:
    assert law.weights(4) == pytest.approx(expected, abs=1e-12)


def test_laws_by_rank_weigh_ranks() -> None:
    skew = ByRank(weights_of=((128, 4.0),)).weights(TEN)
    assert skew == pytest.approx([1 / 16] * 8 + [4 / 16] * 2)
    power = RankPower(alpha=-1.0).weights((64, 8, 8, 16))
    assert power == pytest.approx([2 / 11, 3 / 11, 3 / 11, 3 / 11])
    inside = RankShares(shares_of=((8, 3.0), (16, 1.0)), inside=Zipf()).weights((8, 8, 16))
    assert inside == pytest.approx([0.5, 0.25, 0.25])


def test_pareto_weights_are_quantiles_of_pareto() -> None:
    weights = Pareto(alpha=2.0).weights(100)
    quantiles = stats.pareto(2.0).ppf(1 - (np.arange(100) + 0.5) / 100)
    assert weights == pytest.approx(quantiles / quantiles.sum())


@pytest.mark.skipif(not SHARED.exists(), reason="no shared traces beside the checkout")
def test_the_stretched_default_is_near_the_popularity_of_azure_functions() -> None:
    path = str(SHARED / "maf_popularity_128.npy")
    read = FromFile(path=path).weights(128)
    assert read == pytest.approx(np.sort(np.load(path))[::-1])
    assert np.abs(read - Stretched().weights(128)).sum() / 2 < 0.027


def test_weights_are_read_from_text_and_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("1, 3\n4 0\n")
    assert FromFile(path=str(path)).weights(3) == pytest.approx([4 / 8, 3 / 8, 1 / 8])
    for content, says in (
        (b"1 2 nan 4", "nan is no finite number"),
        (b"1 2 x 4", "could not convert"),
        (b"1 2", "2 weights for 3 adapters"),
        (b"1 -2 3", "weights must be 0 or more"),
        (b"0 0 0", "one above 0"),
        (b"\xff\xfe", "no weights"),
        (b"\x93NUMPY\x01\x00\x00", "no weights"),
        (_npy_header("(1000000000000,)"), "no weights"),
    ):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=says) as caught:
            FromFile(path=str(path)).weights(3)
        assert "\n" not in str(caught.value)
    for missing, says in ((tmp_path / "none", "is not there"), (tmp_path, "is no file")):
        with pytest.raises(TraceError, match=says):
            FromFile(path=str(missing)).weights(3)


def _npy_header(shape: str) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("law", [Zipf(), Power(alpha=0.5), Weights(values=(0.0, 1.0, 2.0, 0.0, 5.0))])
def test_draws_follow_the_weights(law: Popularity) -> None:
    weights = law.weights(5)
    counts = np.bincount(choose(weights, stream(2, 1).random(50_000)), minlength=5)
    drawn = weights > 0
    assert np.all(counts[~drawn] == 0)
    assert stats.chisquare(counts[drawn], weights[drawn] * 50_000).pvalue > 0.01


def drifted(law: Drift, weights: Floats, ranks: tuple[int, ...], count: int = 60_000) -> list[Floats]:
    """Shares per adapter in each tenth of a run of 100 s."""
    times_s = np.arange(count) / count * 100.0
    run = Run(weights, ranks, times_s, 100.0, stream(5, 1).random(count))
    places = law.choose(run, stream(5, 2))
    return [np.bincount(part, minlength=len(weights)) / len(part) for part in np.array_split(places, 10)]


def test_sliding_moves_the_heat_from_high_to_low_ranks_in_a_straight_line() -> None:
    parts = drifted(Slide(), ByRank(weights_of=((128, 4.0),)).weights(TEN), TEN)
    hot = [part[8:].sum() for part in parts]
    cold = [part[:2].sum() for part in parts]
    line = [0.5 - 0.375 * (tenth + 0.5) / 10 for tenth in range(10)]
    assert hot == pytest.approx(line, abs=0.03)
    assert cold == pytest.approx(line[::-1], abs=0.03)


def test_rotation_hands_shares_on() -> None:
    weights = Weights(values=(6.0, 3.0, 1.0)).weights(3)
    parts = drifted(Rotate(every_s=10.0), weights, (8, 8, 8))
    for turn, part in enumerate(parts):
        assert part == pytest.approx(np.roll(weights, turn), abs=0.03)


def test_a_swap_turns_the_order_round_at_its_times() -> None:
    weights = Weights(values=(1.0, 6.0, 3.0)).weights(3)
    parts = drifted(Swap(at_s=(60.0, 30.0)), weights, (8, 8, 8))
    turned = np.array([0.6, 0.1, 0.3])
    for tenth, part in enumerate(parts):
        assert part == pytest.approx(turned if 3 <= tenth < 6 else weights, abs=0.03)


def test_shuffling_keeps_the_shares_and_changes_their_owners() -> None:
    weights = Geometric(ratio=2.0).weights(8)
    parts = drifted(Shuffle(every_s=10.0), weights, (8,) * 8)
    for part in parts:
        assert np.sort(part)[::-1] == pytest.approx(weights, abs=0.03)
    assert parts[0] == pytest.approx(weights, abs=0.03)
    assert len({int(np.argmax(part)) for part in parts}) > 2
    quiet = drifted(Shuffle(every_s=10.0, share=0.0), weights, (8,) * 8)
    assert quiet[9] == pytest.approx(weights, abs=0.03)


def test_a_walk_drifts_further_the_longer_it_goes() -> None:
    weights = Uniform().weights(20)
    parts = drifted(Walk(sigma=0.5, every_s=10.0), weights, (8,) * 20)
    spread = [float(np.abs(part - weights).sum()) for part in parts]
    assert spread[0] < 0.1 < spread[3] < spread[9]
    # Even a walk that leaves all but one adapter without a share stays a distribution.
    wild = drifted(Walk(sigma=10.0, every_s=0.1), weights, (8,) * 20, count=1_000)
    assert all(part.sum() == pytest.approx(1.0) for part in wild)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [Still(), Slide(), Rotate(every_s=0.3), Shuffle(every_s=1.0), Swap(at_s=(0.0, 3.0)), Walk()]
    ),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(lambda values: sum(values) > 1e-3),
    st.integers(0, 100),
)
def test_drift_chooses_adapters_that_are_there(law: Drift, values: list[float], count: int) -> None:
    weights = shares(np.array(values))
    times_s = np.sort(stream(1, 1).random(count)) * 7.0
    run = Run(weights, (8,) * len(values), times_s, 7.0, stream(1, 2).random(count))
    places = law.choose(run, stream(1, 3))
    assert len(places) == count
    assert np.all((places >= 0) & (places < len(values)))
    assert np.array_equal(places, law.choose(run, stream(1, 3)))


def ranks_of(law: Ranks, number: int) -> list[int | None]:
    return [adapter.rank for adapter in law.adapters(number, stream(0, 4))]


def test_ranks_are_divided_as_asked() -> None:
    assert ranks_of(EqualRanks(of=(8, 16)), 5) == [8, 8, 8, 16, 16]
    assert ranks_of(WeightedRanks(weights_of=((32, 1.0), (8, 3.0))), 4) == [8, 8, 8, 32]
    assert ranks_of(PowerRanks(alpha=1.0, of=(64, 8)), 3) == [8, 64, 64]
    drawn = ranks_of(DrawnRanks(of=(8, 16)), 1_000)
    assert drawn == sorted(drawn)  # type: ignore[type-var]
    assert drawn.count(8) == pytest.approx(500, abs=60)
    names = NamedAdapters(names=("b-rank-64", "a-rank-8")).adapters(0, stream(0, 4))
    assert names == (TraceAdapter(name="b-rank-64", rank=64), TraceAdapter(name="a-rank-8", rank=8))


@given(
    st.lists(st.floats(0, 1e9), min_size=1, max_size=20).filter(lambda values: sum(values) > 0),
    st.integers(0, 999),
)
def test_apportioning_gives_out_everything_within_one_of_the_exact_share(
    values: list[float], total: int
) -> None:
    counts = apportion(np.array(values), total)
    assert counts.sum() == total
    assert np.all(np.abs(counts - shares(np.array(values)) * total) < 1 + 1e-6)


def test_adapters_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "adapters.csv"
    path.write_text("name,rank\n# ours\nsql,8\n\nchat-rank-64\n")
    found = AdaptersOfFile(path=str(path)).adapters(0, stream(0, 4))
    assert found == (TraceAdapter(name="sql", rank=8), TraceAdapter(name="chat-rank-64", rank=64))
    for text, says in (
        ("sql\n", ":1: no rank from 1 to 65,536"),
        ("a,8\nsql,0\n", ":2: no rank"),
        ("a,8,9\n", ":1: 3 fields"),
        ("a,8\na,16\n", "'a' is there twice"),
        ("a\x07b,8\n", "is no adapter name"),
        ("", "0 adapters"),
        (f"{'x' * 200_000},8\n", "is no list of name,rank"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=says):
            AdaptersOfFile(path=str(path)).adapters(0, stream(0, 4))


def test_rank_goes_with_popularity_as_asked() -> None:
    adapters = EqualRanks().adapters(100, stream(0, 4))
    weights = Zipf().weights(100)
    for correlation in (-1.0, -0.6, 0.0, 0.6, 1.0):
        found = []
        for seed in range(20):
            laid = lay_out(adapters, weights, correlation, stream(seed, 6))
            assert sorted(one.name for one in laid) == sorted(one.name for one in adapters)
            found.append(stats.spearmanr([one.rank or 0 for one in laid], weights).statistic)
        # Four standard errors of twenty correlations of a hundred.
        assert np.mean(found) == pytest.approx(correlation, abs=0.09)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Zipf(exponent=-1.0), "exponent of zipf popularity is -1"),
        (lambda: Power(alpha=0.0), "alpha of power popularity is 0"),
        (lambda: Geometric(ratio=0.5), "ratio of geometric popularity is 0.5"),
        (lambda: Weights(values=(0.0, 0.0)), "there must be a weight above 0"),
        (lambda: Weights(values=(1.0,)).weights(2), "1 weights for 2 adapters"),
        (lambda: RankPower(inside=ByRank()), "inside a rank popularity cannot go by rank"),
        (lambda: RankShares(shares_of=((8, 1.0),)).weights((8, 16)), "no share is given for rank 16"),
        (lambda: ByRank(weights_of=((8, 0.0),)).weights((8, 8)), "every rank of the workload weighs 0"),
        (lambda: Rotate(every_s=0.0), "every_s of rotate drift is 0; it must be from 1e-06"),
        (lambda: Shuffle(share=1.5), "share of shuffle drift is 1.5"),
        (
            lambda: drifted(Shuffle(every_s=1e-6), np.ones(9) / 9, (8,) * 9),
            "every_s of shuffle drift of 1e-06 s",
        ),
        (lambda: drifted(Walk(every_s=1e-9), np.ones(9) / 9, (8,) * 9), "every_s of walk drift of 1e-09 s"),
        (lambda: Swap(at_s=()), "swap drift needs"),
        (lambda: EqualRanks(of=()), "ranks must be at least one"),
        (lambda: EqualRanks(of=(8, 8)), "each named once"),
        (lambda: EqualRanks(of=(0,)), "a rank is 0"),
        (lambda: NamedAdapters(names=("plain",)), "'plain' tells no rank"),
    ],
)
def test_impossible_popularity_and_ranks_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        make()


def test_every_law_has_a_name() -> None:
    assert {Uniform, Zipf, Power, Pareto, Geometric, Stretched, Blocks, FromFile, Weights} < set(
        POPULARITY.values()
    )
    assert {ByRank, RankPower, RankShares} < set(POPULARITY.values())
    assert set(DRIFTS.values()) == {Still, Slide, Rotate, Shuffle, Swap, Walk}
    assert set(RANKS.values()) == {
        EqualRanks,
        WeightedRanks,
        PowerRanks,
        DrawnRanks,
        NamedAdapters,
        AdaptersOfFile,
    }
