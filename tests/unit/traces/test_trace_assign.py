"""Adapters are assigned as asked for, the same way every time, and nothing else of a trace changes."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import (
    AdapterRef,
    Trace,
    TraceError,
    TraceRequest,
    assign_adapters,
    bundled_trace,
    map_adapters,
    unknown_adapters,
)
from traces.assign import METHODS
from traces.synth import Lengths, SynthSpec, main, synthesise

ADAPTERS = tuple(AdapterRef(name=f"rank-{rank}", rank=rank) for rank in (8, 16, 32, 64, 128))


def plain(count: int, names: tuple[str | None, ...] = (None,)) -> Trace:
    return Trace.of(
        (
            TraceRequest(
                index=index,
                arrival_s=index / 4,
                prompt_tokens=index + 1,
                output_tokens=2 * index + 1,
                adapter=names[index % len(names)],
            )
            for index in range(count)
        ),
        source="plain",
        format="plain",
    )


def without_adapters(trace: Trace) -> list[TraceRequest]:
    return [replace(request, adapter=None, rank=None) for request in trace.requests]


@given(
    st.sampled_from(sorted(METHODS)),
    st.integers(0, 60),
    st.integers(1, 5),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_assignment_is_deterministic_and_changes_adapters_alone(
    method: str, count: int, num_adapters: int, seed: int, base_share: float
) -> None:
    trace, adapters = plain(count), ADAPTERS[:num_adapters]
    one = assign_adapters(trace, adapters, method=method, seed=seed, base_share=base_share)
    assert one == assign_adapters(trace, adapters, method=method, seed=seed, base_share=base_share)
    assert without_adapters(one) == without_adapters(trace)
    ranks = {adapter.name: adapter.rank for adapter in adapters}
    assert all(
        request.rank is None if request.adapter is None else request.rank == ranks[request.adapter]
        for request in one.requests
    )
    if base_share in (0.0, 1.0):
        assert sum(one.adapter_counts().values()) == (count if base_share == 0 else 0)


def test_round_robin_takes_each_in_turn() -> None:
    trace = assign_adapters(plain(7), ADAPTERS[:3])
    assert [request.rank for request in trace.requests] == [8, 16, 32, 8, 16, 32, 8]


@pytest.mark.parametrize(
    ("method", "parameter", "expected"),
    [
        ("uniform", None, [0.2] * 5),
        ("power", None, [0.2] * 5),
        ("power", 0.5, [math.sqrt(k / 5) - math.sqrt((k - 1) / 5) for k in range(1, 6)]),
        ("power", 2.0, [(k / 5) ** 2 - ((k - 1) / 5) ** 2 for k in range(1, 6)]),
        ("zipf", None, [1 / k / sum(1 / j for j in range(1, 6)) for k in range(1, 6)]),
        ("zipf", 2.0, [1 / k**2 / sum(1 / j**2 for j in range(1, 6)) for k in range(1, 6)]),
    ],
)
def test_popularity_follows_its_law(method: str, parameter: float | None, expected: list[float]) -> None:
    count = 20_000
    trace = assign_adapters(plain(count), ADAPTERS, method=method, parameter=parameter, seed=1)
    counts = trace.adapter_counts()
    shares = [counts[adapter.name] / count for adapter in ADAPTERS]
    # Four standard deviations of a share of one half.
    assert shares == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count))


def test_the_base_model_gets_its_share() -> None:
    trace = assign_adapters(plain(10_000), ADAPTERS, method="zipf", seed=3, base_share=0.25)
    base = sum(request.adapter is None for request in trace.requests)
    assert base / 10_000 == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "random"}, "there are: round-robin, uniform, zipf, power"),
        ({"method": "uniform", "parameter": 1.0}, "uniform takes no parameter"),
        ({"method": "zipf", "parameter": 0.0}, "a zipf parameter of 0.0 is not possible"),
        ({"method": "power", "parameter": math.nan}, "a power parameter of nan is not possible"),
        ({"base_share": 1.5}, "a base share of 1.5 is not possible"),
        ({"base_share": math.nan}, "a base share of nan is not possible"),
    ],
)
def test_an_impossible_assignment_is_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        assign_adapters(plain(1), ADAPTERS, **arguments)  # type: ignore[arg-type]


def test_adapters_are_needed_unless_all_is_base() -> None:
    with pytest.raises(TraceError, match="no adapters to assign"):
        assign_adapters(plain(1), ())
    assert assign_adapters(plain(3), (), base_share=1.0).adapter_counts() == {}


def test_names_are_mapped_by_popularity_and_start_over() -> None:
    trace = plain(60, ("b", "a", "b", None, "c", "b"))
    mapped = map_adapters(trace, ADAPTERS[:2])
    assert [request.adapter for request in mapped.requests[:6]] == [
        "rank-8",
        "rank-16",
        "rank-8",
        None,
        "rank-8",
        "rank-8",
    ]
    assert [request.rank for request in mapped.requests[:4]] == [8, 16, 8, None]
    assert without_adapters(mapped) == without_adapters(trace)


def test_a_registered_name_keeps_itself_unless_told_otherwise() -> None:
    trace = plain(6, ("rank-64", "stranger", "rank-64"))
    assert unknown_adapters(trace, ["rank-64"]) == ("stranger",)
    assert map_adapters(trace, ADAPTERS).adapter_counts() == {"rank-64": 4, "rank-8": 2}
    assert map_adapters(trace, ADAPTERS, keep_known=False).adapter_counts() == {"rank-8": 4, "rank-16": 2}


def test_mapping_needs_adapters_only_where_names_are() -> None:
    assert map_adapters(plain(2), ()) == plain(2)
    with pytest.raises(TraceError, match="name at least one"):
        map_adapters(plain(2, ("a",)), ())


SPEC = SynthSpec(
    num_requests=500,
    duration_s=100.0,
    adapters=ADAPTERS,
    prompt=Lengths(median_tokens=40, sigma=0.5, min_tokens=16, max_tokens=96),
    output=Lengths(median_tokens=16, sigma=0.4, min_tokens=8, max_tokens=32),
    base_share=0.1,
    seed=5,
)


@pytest.mark.parametrize("arrivals", ["poisson", "uniform"])
def test_a_synthetic_trace_keeps_to_its_spec(arrivals: str) -> None:
    spec = replace(SPEC, arrivals=arrivals)
    trace = synthesise(spec)
    assert trace == synthesise(spec)
    assert trace.requests != synthesise(replace(spec, seed=6)).requests
    assert len(trace) == 500
    assert 95 < trace.duration_s <= 100
    prompts = sorted(request.prompt_tokens for request in trace.requests)
    assert (prompts[0], prompts[-1]) == (16, 96)
    assert prompts[250] == pytest.approx(40, abs=4)
    assert all(8 <= request.output_tokens <= 32 for request in trace.requests)
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(trace.requests, trace.requests[1:], strict=False)]
    mean_s = sum(gaps) / len(gaps)
    variation = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps)) / mean_s
    assert variation == pytest.approx(1.0 if arrivals == "poisson" else 0.0, abs=0.15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_requests": 0}, "0 requests are no workload"),
        ({"duration_s": math.inf}, "a duration of inf s"),
        ({"arrivals": "bursty"}, "there are: poisson, uniform"),
    ],
)
def test_an_impossible_spec_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        replace(SPEC, **change)  # type: ignore[arg-type]


def test_the_bundled_trace_is_what_its_readme_says(tmp_path: Path) -> None:
    trace = bundled_trace("demo")
    counts = Counter(request.rank for request in trace.requests)
    assert (trace.source, len(trace), round(trace.duration_s)) == ("bundled:demo", 120, 59)
    assert set(counts) == {None, 8, 16, 32, 64, 128}
    assert min(counts.values()) >= 8
    assert {(request.adapter, request.rank) for request in trace.requests} == {(None, None)} | {
        (f"rank-{rank}", rank) for rank in (8, 16, 32, 64, 128)
    }
    assert all(16 <= request.prompt_tokens <= 96 for request in trace.requests)
    assert all(8 <= request.output_tokens <= 32 for request in trace.requests)

    folder = Path(__file__).parents[3] / "traces" / "bundled"
    command = next(line for line in (folder / "README").read_text().splitlines() if "traces.synth" in line)
    again = tmp_path / "demo.csv"
    assert main([str(again), *command.split()[4:]]) == 0
    assert again.read_bytes() == (folder / "demo.csv").read_bytes()


def test_an_unknown_bundled_trace_lists_the_known() -> None:
    with pytest.raises(TraceError, match="there are: demo"):
        bundled_trace("../types")


@pytest.mark.parametrize(
    "arguments",
    [["--requests", "0"], ["--prompt", "1,2"], ["--ranks", "x"], ["--ranks", ""], ["--zipf", "-1"]],
)
def test_the_command_refuses_bad_input_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main([str(tmp_path / "out.csv"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()
