"""Whole workloads: the same spec gives the same bits, aspects are independent, presets are as published,
text says what a law is."""

import dataclasses
import hashlib
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.columns import BASE, TraceColumns
from traces.synthesis import PRESETS, Overrides, WorkloadSpec, is_preset, synthesise, workload, workload_spec
from traces.synthesis.arrivals import ARRIVALS, Gamma, Markov
from traces.synthesis.drift import DRIFTS, Shuffle
from traces.synthesis.lengths import LENGTHS, Fixed, Lognormal
from traces.synthesis.notation import law_text, read_law
from traces.synthesis.popularity import POPULARITY, ByRank, RankPower, Zipf
from traces.synthesis.ranks import RANKS, EqualRanks
from traces.types import TraceError

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "adapter")
REGISTRIES: Mapping[str, Mapping[str, type]] = {
    "arrivals": ARRIVALS,
    "popularity": POPULARITY,
    "drift": DRIFTS,
    "lengths": LENGTHS,
    "ranks": RANKS,
}


def digest(columns: TraceColumns) -> str:
    found = hashlib.sha256()
    for name in COLUMNS:
        found.update(np.ascontiguousarray(getattr(columns, name)).tobytes())
    found.update(repr(columns.adapters).encode())
    return found.hexdigest()[:16]


def differing(one: TraceColumns, other: TraceColumns) -> set[str]:
    names = {name for name in COLUMNS if not np.array_equal(getattr(one, name), getattr(other, name))}
    return names | ({"adapters"} if one.adapters != other.adapters else set())


@pytest.mark.parametrize("name", [*PRESETS, "loraserve-powerlaw--0.5"])
def test_every_preset_is_a_workload_at_its_rate(name: str) -> None:
    columns, spec = workload(name), workload_spec(name)
    assert len(columns) == spec.num_requests
    assert len(columns) / columns.duration_s == pytest.approx(spec.rate_per_s, rel=0.02)
    assert columns.arrival_s[0] == 0
    assert np.all(np.diff(columns.arrival_s) >= 0)
    assert columns.adapter.min() >= 0
    assert columns.adapter.max() < len(columns.adapters) == spec.num_adapters
    for field in COLUMNS[1:]:
        assert getattr(columns, field).dtype == np.int32
    assert columns.prompt_tokens.min() >= 1
    assert columns.output_tokens.min() >= 1


def shares_of_ranks(columns: TraceColumns) -> dict[int, float]:
    counts = np.bincount(columns.adapter, minlength=len(columns.adapters)) / len(columns)
    found: dict[int, float] = {}
    for adapter, share in zip(columns.adapters, counts.tolist(), strict=True):
        found[adapter.rank or 0] = found.get(adapter.rank or 0, 0.0) + share
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loraserve-uniform", {8: 0.2, 16: 0.2, 32: 0.2, 64: 0.2, 128: 0.2}),
        ("loraserve-skew", {8: 5 / 40, 16: 5 / 40, 32: 5 / 40, 64: 5 / 40, 128: 20 / 40}),
        ("loraserve-skewslide", {8: 12.5 / 40, 16: 5 / 40, 32: 5 / 40, 64: 5 / 40, 128: 12.5 / 40}),
        ("loraserve-powerlaw-2", {8: 1 / 55, 16: 4 / 55, 32: 9 / 55, 64: 16 / 55, 128: 25 / 55}),
        ("loraserve-production", {8: 0.57, 16: 0.34, 32: 0.09}),
        ("chameleon", {8: 0.2, 16: 0.2, 32: 0.2, 64: 0.2, 128: 0.2}),
    ],
)
def test_ranks_have_their_published_shares(name: str, expected: dict[int, float]) -> None:
    assert shares_of_ranks(workload(name)) == pytest.approx(expected, abs=0.02)


def test_loraserve_s_workloads_keep_to_its_limits_and_rates() -> None:
    for adapters, rate in ((25, 28.0), (50, 32.0), (100, 58.0), (150, 96.0)):
        columns = workload("loraserve-skew", Overrides(adapters=adapters, duration=60.0))
        assert len(columns) == rate * 60
        assert columns.prompt_tokens.max() <= 1024
        assert columns.output_tokens.max() <= 256
        ranks = [adapter.rank for adapter in columns.adapters]
        assert {ranks.count(rank) for rank in (8, 16, 32, 64, 128)} == {adapters // 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loraserve-skewslide", "92533207720969ea"),
        ("loraserve-bursty,seed=7", "b8cef6637f7f4a33"),
        (
            "chameleon,arrivals=gamma:4,drift=walk:0.2,30,correlation=0.5,popularity=pareto,base-share=0.1",
            "c513079d9cf75264",
        ),
        ("slora,arrivals=weibull:2,lengths=lognormal,drift=shuffle:60,0.3,ranks=drawn", "bc211c20ac0c530f"),
        ("toppings,arrivals=markov,popularity=power:0.4,lengths=azure,drift=rotate", "c8dfc0b72cf3a7b0"),
        ("punica,arrivals=day:3,600", "c2eae05ac292fd29"),
    ],
)
def test_workloads_are_the_same_bits_on_every_machine(text: str, expected: str) -> None:
    assert digest(workload(f"preset:{text}")) == expected


SPEC = WorkloadSpec(
    num_requests=500,
    duration_s=50.0,
    popularity=Zipf(),
    correlation=0.3,
    drift=Shuffle(every_s=10.0),
    base_share=0.2,
)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"arrivals": Gamma(cv=3.0), "drift": SPEC.drift}, {"arrival_s", "adapter"}),
        ({"popularity": Zipf(exponent=2.0)}, {"adapter"}),
        ({"drift": Shuffle(every_s=20.0)}, {"adapter"}),
        ({"base_share": 0.3}, {"adapter"}),
        ({"lengths": Fixed()}, {"prompt_tokens", "output_tokens"}),
        ({"ranks": EqualRanks(of=(8, 16))}, {"adapters"}),
        ({"correlation": -0.3}, {"adapters"}),
        ({"seed": 1}, {"arrival_s", "adapter", "prompt_tokens", "output_tokens", "adapters"}),
        ({"name": "other"}, set()),
    ],
)
def test_changing_one_aspect_leaves_the_others(changed: dict[str, object], expected: set[str]) -> None:
    other = replace(SPEC, **changed)  # type: ignore[arg-type]
    assert differing(synthesise(SPEC), synthesise(other)) == expected


def test_changing_the_arrivals_leaves_the_adapters_of_a_still_popularity() -> None:
    spec = WorkloadSpec(num_requests=500, duration_s=50.0, popularity=Zipf())
    assert differing(synthesise(spec), synthesise(replace(spec, arrivals=Gamma(cv=3.0)))) == {"arrival_s"}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.floats(1e-3, 1e7),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**63 - 1),
)
def test_any_spec_gives_its_requests_twice_alike(
    count: int, duration_s: float, adapters: int, base_share: float, seed: int
) -> None:
    spec = WorkloadSpec(
        num_requests=count, duration_s=duration_s, num_adapters=adapters, base_share=base_share, seed=seed
    )
    columns = synthesise(spec)
    assert digest(columns) == digest(synthesise(spec))
    assert len(columns) == count
    assert columns.duration_s <= duration_s
    assert np.all(np.diff(columns.arrival_s) >= 0)
    if base_share in (0.0, 1.0):
        assert np.all((columns.adapter == BASE) == (base_share == 1.0))


def test_what_a_file_says_is_used(tmp_path: Path) -> None:
    trace, weights, adapters = tmp_path / "trace.csv", tmp_path / "with, comma", tmp_path / "adapters"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,7,3\n2023-11-16 18:00:01.0,9,4\n"
    )
    weights.write_text("0 1")
    adapters.write_text("sql,8\nchat,64\n")
    columns = workload(
        "slora",
        Overrides(
            requests=4,
            duration=8.0,
            arrivals=f"trace:{trace}",
            lengths=f"in-order:path={trace}",
            popularity=f"file:{weights}",
            ranks=f"file:{adapters}",
        ),
    )
    assert columns.arrival_s.tolist() == [0.0, 2.0, 4.0, 6.0]
    assert columns.prompt_tokens.tolist() == [7, 9, 7, 9]
    assert columns.output_tokens.tolist() == [3, 4, 3, 4]
    # The most popular is the file's first.
    assert [columns.adapters[place].name for place in columns.adapter] == ["sql"] * 4


@pytest.mark.parametrize(
    ("given", "requests", "duration_s"),
    [
        ({}, 25_200, 900.0),
        ({"rate": 10.0}, 9_000, 900.0),
        ({"duration": 90.0}, 2_520, 90.0),
        ({"requests": 280}, 280, 10.0),
        ({"requests": 300, "rate": 30.0}, 300, 10.0),
        ({"requests": 300, "duration": 60.0}, 300, 60.0),
        ({"rate": 0.5, "duration": 3.0}, 2, 3.0),
    ],
)
def test_two_of_rate_duration_and_requests_give_the_third(
    given: dict[str, typing.Any], requests: int, duration_s: float
) -> None:
    spec = workload_spec("loraserve-skew", Overrides(**given))
    assert spec.num_requests == requests
    assert spec.duration_s == pytest.approx(duration_s)


def test_a_preset_in_a_trace_argument_takes_settings() -> None:
    assert is_preset("preset:slora")
    assert not is_preset("slora.csv")
    text = (
        "preset:loraserve-skew,adapters=50,arrivals=markov:rates=1/9,stays_s=5/2,ranks=8,16,over=clip,seed=3"
    )
    spec = workload_spec(text, Overrides(seed=1, rate=2.0, popularity="rank-power:alpha=1,inside=zipf:2"))
    assert spec.arrivals == Markov(rates=(1.0, 9.0), stays_s=(5.0, 2.0))
    assert spec.ranks == EqualRanks(of=(8, 16))
    assert spec.popularity == RankPower(alpha=1.0, inside=Zipf(exponent=2.0))
    assert (spec.num_adapters, spec.seed, spec.rate_per_s, spec.limits.over) == (50, 3, 2.0, "clip")
    assert workload_spec("loraserve-skew").popularity == ByRank(weights_of=((128, 4.0),))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_written_as_text_is_itself(name: str) -> None:
    spec = workload_spec(name)
    text = spec.as_text()
    for field, laws in REGISTRIES.items():
        law = getattr(spec, field)
        assert text[field] == law_text(law, laws)
        assert read_law(str(text[field]), laws, field) == law


def test_no_field_of_a_law_is_called_like_a_setting() -> None:
    """`preset:NAME,key=value` could not tell them apart."""
    settings_of = {field.name.replace("_", "-") for field in dataclasses.fields(Overrides)}
    for laws in REGISTRIES.values():
        for kind in laws.values():
            assert not settings_of & {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: WorkloadSpec(num_requests=0, duration_s=1.0), "the number of requests is 0"),
        (lambda: WorkloadSpec(num_requests=1, duration_s=math.inf), "the duration in seconds is inf"),
        (lambda: WorkloadSpec(num_requests=1, duration_s=math.nan), "the duration in seconds is nan"),
        (lambda: replace(SPEC, num_adapters=0), "the number of adapters is 0"),
        (lambda: replace(SPEC, base_share=1.5), "the base share is 1.5"),
        (lambda: replace(SPEC, seed=-1), "the seed is -1"),
        (lambda: replace(SPEC, correlation=2.0), "the correlation of rank and popularity is 2"),
        (lambda: replace(SPEC, popularity=ByRank()), "popularity by rank takes no correlation"),
        (lambda: workload("none"), "no preset is called 'none'; there are: loraserve-uniform, "),
        (lambda: workload("loraserve-powerlaw-99"), "alpha of rank-power popularity is 99"),
        (lambda: workload("slora,adapters=x"), "adapters: 'x' is no number"),
        (lambda: workload("slora", Overrides(adapters=0)), "0 adapters are not possible"),
        (lambda: workload("slora", Overrides(rate=0.0)), "the rate is 0; it must be above 0"),
        (lambda: workload("slora", Overrides(rate=1.0, duration=1.0, requests=1)), "give two at most"),
        (
            lambda: workload("slora", Overrides(requests=10**9)),
            "is 1,000,000,000; it must be from 1 to 50,000,000",
        ),
        (
            lambda: workload("slora", Overrides(arrivals="gama")),
            "arrivals: 'gama' is unknown; there are: even,",
        ),
        (lambda: workload("slora", Overrides(arrivals="gamma:x")), "'x' is no cv; write gamma:cv=..."),
        (lambda: workload("slora", Overrides(arrivals="gamma:1,2")), "'2' is too much; write gamma:cv=..."),
        (lambda: workload("slora", Overrides(arrivals="gamma:1,cv=2")), "cv is given twice"),
        (
            lambda: workload("slora", Overrides(arrivals="gamma:cv=99")),
            "arrivals: cv of gamma arrivals is 99",
        ),
        (lambda: workload("slora", Overrides(lengths="fixed:" + "9" * 400)), "is no prompt_tokens"),
        (
            lambda: Fixed(prompt_tokens=10**9_999),
            "is a number of 33216 bits; it must be from 1 to 10,000,000",
        ),
        (lambda: workload("slora", Overrides(arrivals="trace")), "trace needs path; write trace:path=..."),
        (lambda: workload("slora", Overrides(arrivals="trace:")), "trace needs path"),
        (lambda: workload("slora", Overrides(arrivals="trace:nowhere.csv")), "nowhere.csv: cannot read"),
        (lambda: workload("slora", Overrides(popularity="by-rank:8")), "'8' is no weights_of"),
        (lambda: workload("slora", Overrides(popularity="rank-power:1,inside=x")), "inside: 'x' is unknown"),
        (lambda: workload("slora", Overrides(lengths="x" * 200_000)), "200,000 characters are too many"),
    ],
)
def test_an_impossible_workload_is_refused_in_one_line(make: Callable[[], object], says: str) -> None:
    with pytest.raises(TraceError) as caught:
        make()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_values_of_laws_survive_text() -> None:
    for law, laws in (
        (Lognormal(prompt_median=1.5, output_sigma=0.123456789), LENGTHS),
        (Markov(rates=(0.0, 1e-7, 3.0), stays_s=(1.0, 2.0, 1e6)), ARRIVALS),
        (ByRank(weights_of=((8, 0.25), (128, 4.0))), POPULARITY),
    ):
        assert read_law(law_text(law, laws), laws, "law") == law
