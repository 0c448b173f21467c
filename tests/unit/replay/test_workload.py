"""A workload is cut, shortened and given registered adapters only."""

from pathlib import Path

import pytest

from loraserve.errors import BadInputError
from loraserve.replay.workload import WorkloadOptions, give_adapters, read_workload, shorten
from traces.assign import AdapterRef
from traces.types import Trace, TraceRequest

REGISTERED = (AdapterRef(name="big", rank=64), AdapterRef(name="small", rank=8))


def trace_of(*adapters: str | None) -> Trace:
    requests = (
        TraceRequest(index=index, arrival_s=index, prompt_tokens=100, output_tokens=50, adapter=adapter)
        for index, adapter in enumerate(adapters)
    )
    return Trace.of(requests, source="test", format="test")


def names(trace: Trace) -> list[str | None]:
    return [request.adapter for request in trace.requests]


def options(source: str = "demo", **settings: object) -> WorkloadOptions:
    return WorkloadOptions(source=source, **settings)  # type: ignore[arg-type]


def test_the_bundled_trace_is_cut_by_number_and_by_time() -> None:
    assert len(read_workload(options(limit=7))) == 7
    assert read_workload(options(duration_s=5.0)).duration_s < 5.0


def test_a_preset_is_a_workload_like_any_other() -> None:
    trace = read_workload(options("preset:loraserve-skew,adapters=10,requests=90,seed=4", limit=50))
    assert len(trace) == 50
    assert {request.rank for request in trace.requests} <= {8, 16, 32, 64, 128}
    assert set(names(give_adapters(trace, options(), REGISTERED))) == {"big", "small"}
    with pytest.raises(BadInputError, match="no preset is called 'none'"):
        read_workload(options("preset:none"))


def test_a_bad_row_is_refused_with_its_line_or_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,4,5\nx,y,z\n")
    with pytest.raises(BadInputError, match=r"trace\.csv:3.*on-bad-row.*skip"):
        read_workload(options(str(path)))
    trace = read_workload(options(str(path), on_bad_row="skip"))
    assert (len(trace), trace.num_bad_rows, trace.bad_rows[0].line) == (1, 1, 3)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_file_that_cannot_be_read_is_bad_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match=name):
        read_workload(options(str(tmp_path / name)))


def test_automatic_assignment_maps_names_or_takes_turns_or_uses_the_base_model() -> None:
    with_names = give_adapters(trace_of("x", "x", "y", None), options(), REGISTERED)
    assert names(with_names) == ["small", "small", "big", None]
    without = give_adapters(trace_of(None, None, None), options(), REGISTERED)
    assert names(without) == ["small", "big", "small"]
    assert [request.rank for request in without.requests] == [8, 64, 8]
    assert names(give_adapters(trace_of("x", None), options(), ())) == [None, None]


def test_adapters_of_the_trace_must_be_registered_when_taken_as_they_are() -> None:
    strict = options(assign="from-trace")
    assert names(give_adapters(trace_of("big", None), strict, REGISTERED)) == ["big", None]
    with pytest.raises(BadInputError, match=r"not registered: x;.*--assign map"):
        give_adapters(trace_of("big", "x"), strict, REGISTERED)


def test_named_adapters_are_used_in_their_order_and_must_be_registered() -> None:
    drawn = options(assign="round-robin", adapters=("big", "small"))
    assert names(give_adapters(trace_of(None, None, None), drawn, REGISTERED)) == ["big", "small", "big"]
    with pytest.raises(BadInputError, match="not registered: huge; registered: big, small"):
        give_adapters(trace_of(None), options(adapters=("huge",)), REGISTERED)


def test_wrong_flags_are_named() -> None:
    with pytest.raises(BadInputError, match="--assign: best is unknown; allowed: auto"):
        read_workload(options(assign="best"))
    with pytest.raises(BadInputError, match=r"--assign uniform.*base share"):
        give_adapters(trace_of(None), options(assign="uniform", base_share=2.0), REGISTERED)


def test_lengths_are_cut_and_counted() -> None:
    trace, changed = shorten(trace_of(None, None), options(max_prompt_tokens=30, max_output_tokens=200))
    assert changed == 2
    assert {(request.prompt_tokens, request.output_tokens) for request in trace.requests} == {(30, 50)}
    assert shorten(trace, options())[1] == 0
