"""Every format is found by its content and read exactly; real traces have their published figures."""

import gzip
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Trace, TraceError, TraceRequest, read_trace, write_trace
from traces.formats import FORMATS
from traces.formats.slora import rank_in_name
from traces.quantiles import percentile
from traces.write import trace_csv

REAL = Path(__file__).parents[4] / "shared" / "traces"

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
)
BURSTGPT_SIX = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"
)
BURSTGPT_EIGHT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "10,a,5,ChatGPT,100,50,150,Conversation log\n20,,,ChatGPT,200,60,260,API log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 40160, "output_length": 6, "hash_ids": [0, 1]}\n'
    '{"timestamp": 1500, "input_length": 3.0, "output_length": 4}\n'
)
SLORA_FIVE = "req_id,adapter,prompt_len,output_len,req_time\n0,x-rank-8-13,13,199,0.25\n1,None,36,137,0.5\n"
SLORA_ARTIFACT = (
    "req_id,model_dir,adapter_dir,prompt_len,output_len,req_time\n"
    "0,some/llama,x-lora-7b-rank-128-0,597,9,0.125\n"
)
SLORA_RANK = (
    "req_id,adapter,prompt_len,output_len,req_time,rank\n0,rank-8,3,4,0.0,16\n1,plain,3,4,1.0,\n2,,3,4,1.0,\n"
)


def read(tmp_path: Path, text: str) -> Trace:
    path = tmp_path / "trace"
    path.write_bytes(text.encode())
    return read_trace(path)


def rows(trace: Trace) -> list[tuple[float, int, int, str | None, int | None]]:
    return [
        (request.arrival_s, request.prompt_tokens, request.output_tokens, request.adapter, request.rank)
        for request in trace.requests
    ]


def test_azure_keeps_every_digit_and_needs_no_last_newline(tmp_path: Path) -> None:
    trace = read(tmp_path, AZURE)
    assert trace.format == "azure"
    assert rows(trace) == [
        (0.0, 374, 44, None, None),
        (pytest.approx(4.314579, abs=1e-9), 396, 109, None, None),
    ]


def test_azure_reads_utc_offsets(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 01:00:00.5+01:00,1,2\n2024-05-10T00:00:02Z,1,2\n2024-05-10 00:00:03,1,2\n"
    )
    assert [request.arrival_s for request in read(tmp_path, text).requests] == [0.0, 1.5, 2.5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BURSTGPT_SIX, [(0.0, 472, 18, None, None), (40.0, 1087, 230, None, None)]),
        (BURSTGPT_EIGHT, [(0.0, 100, 50, None, None), (10.0, 200, 60, None, None)]),
    ],
)
def test_burstgpt_is_read_in_both_layouts(tmp_path: Path, text: str, expected: list[object]) -> None:
    trace = read(tmp_path, text)
    assert (trace.format, rows(trace)) == ("burstgpt", expected)


def test_mooncake_counts_milliseconds_and_keeps_block_hashes(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE)
    assert trace.format == "mooncake"
    assert rows(trace) == [(0.0, 40160, 6, None, None), (1.5, 3, 4, None, None)]
    assert [request.hash_ids for request in trace.requests] == [(0, 1), ()]


def test_slora_takes_the_rank_from_the_column_or_else_from_the_name(tmp_path: Path) -> None:
    assert rows(read(tmp_path, SLORA_FIVE)) == [(0.0, 13, 199, "x-rank-8-13", 8), (0.25, 36, 137, None, None)]
    assert rows(read(tmp_path, SLORA_ARTIFACT)) == [(0.0, 597, 9, "x-lora-7b-rank-128-0", 128)]
    assert [row[3:] for row in rows(read(tmp_path, SLORA_RANK))] == [
        ("rank-8", 16),
        ("plain", None),
        (None, None),
    ]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("rank-8", 8),
        ("a_RANK_64", 64),
        ("x/rank16.v2", 16),
        ("frank-8", None),
        ("rank-0", None),
        ("rank-x", None),
    ],
)
def test_a_rank_is_read_from_a_name_only_where_it_is_meant(name: str, rank: int | None) -> None:
    assert rank_in_name(name) == rank


@pytest.mark.parametrize("text", [AZURE, BURSTGPT_SIX, BURSTGPT_EIGHT, MOONCAKE, SLORA_FIVE])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_gzip_a_byte_order_mark_and_blank_lines_change_nothing(tmp_path: Path, text: str, start: str) -> None:
    path = tmp_path / "no-telling-name"
    path.write_bytes(gzip.compress((start + text.replace("\n", "\n\n")).encode()))
    assert rows(read_trace(path)) == rows(read(tmp_path, text))


def test_a_first_line_is_of_at_most_one_format() -> None:
    for text in (AZURE, BURSTGPT_SIX, BURSTGPT_EIGHT, MOONCAKE, SLORA_FIVE, SLORA_ARTIFACT, SLORA_RANK):
        first = text.splitlines()[0]
        assert sum(known.matches(first) for known in FORMATS.values()) == 1


def test_a_named_format_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(AZURE)
    assert read_trace(path, format="azure").format == "azure"
    with pytest.raises(TraceError, match="is not slora; expected CSV req_id"):
        read_trace(path, format="slora")
    with pytest.raises(TraceError, match="there are: azure, burstgpt, mooncake, slora"):
        read_trace(path, format="arena")


def test_limit_and_duration_cut_and_leave_the_rest_unread(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(SLORA_RANK + "3,x,3,4,2.0,\n4,broken\n")
    assert len(read_trace(path, limit=2)) == 2
    assert len(read_trace(path, duration_s=1.0)) == 1
    assert len(read_trace(path, duration_s=2.0)) == 3
    for limit, duration_s in ((0, None), (None, 0.0), (None, math.nan)):
        with pytest.raises(TraceError, match="leaves nothing"):
            read_trace(path, limit=limit, duration_s=duration_s)


names = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).filter(
    lambda name: name == name.strip() and name != "None" and name.isprintable() and rank_in_name(name) is None
)
requests = st.builds(
    lambda arrival_s, prompt, output, adapter: TraceRequest(
        index=0,
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        adapter=adapter[0] if adapter else None,
        rank=adapter[1] if adapter else None,
    ),
    st.floats(0, 1e6),
    st.integers(1, 10_000_000),
    st.integers(1, 10_000_000),
    st.none() | st.tuples(names, st.none() | st.integers(1, 512)),
)


@given(st.lists(requests, min_size=1, max_size=30), st.booleans())
def test_what_is_written_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[TraceRequest], packed: bool
) -> None:
    trace = Trace.of(drawn, source="drawn", format="drawn")
    path = tmp_path_factory.getbasetemp() / ("round-trip.csv.gz" if packed else "round-trip.csv")
    write_trace(trace, path)
    again = read_trace(path)
    assert again.requests == trace.requests
    assert trace_csv(again) == trace_csv(trace)


@given(st.lists(requests, min_size=1, max_size=30))
def test_a_trace_is_sorted_stably_counted_from_zero_and_numbered(drawn: list[TraceRequest]) -> None:
    trace = Trace.of(drawn, source="drawn", format="drawn")
    assert [request.index for request in trace.requests] == list(range(len(drawn)))
    assert trace.requests[0].arrival_s == 0
    expected = sorted(drawn, key=lambda request: request.arrival_s)
    assert [request.adapter for request in trace.requests] == [request.adapter for request in expected]


def test_a_trace_out_of_order_cannot_be_built_by_hand() -> None:
    one = TraceRequest(index=0, arrival_s=1.0, prompt_tokens=1, output_tokens=1)
    with pytest.raises(TraceError, match=r"Trace\.of"):
        Trace(requests=(one,), source="", format="")


@pytest.mark.parametrize("name", ["", "None", " padded", "two\nlines"])
def test_an_adapter_name_that_would_not_come_back_is_not_written(name: str) -> None:
    one = TraceRequest(index=0, arrival_s=0.0, prompt_tokens=1, output_tokens=1, adapter=name)
    with pytest.raises(TraceError, match="cannot be written"):
        trace_csv(Trace.of([one], source="", format=""))


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real trace {name} is not on this machine (looked in ../shared/traces)")
    return path


def test_the_azure_conversation_trace_has_its_published_figures() -> None:
    trace = read_trace(real("AzureLLMInferenceTrace_conv.csv.gz"))
    per_second = Counter(int(request.arrival_s) for request in trace.requests)
    prompts = sorted(request.prompt_tokens for request in trace.requests)
    outputs = sorted(request.output_tokens for request in trace.requests)
    assert (trace.format, len(trace), round(trace.duration_s)) == ("azure", 19_366, 3502)
    assert len(trace) / trace.duration_s == pytest.approx(5.5, abs=0.05)
    assert max(per_second.values()) == 16
    assert [round(percentile(prompts, percent) or 0) for percent in (50, 95)] == [1020, 4083]
    assert [round(percentile(outputs, percent) or 0) for percent in (50, 95)] == [129, 451]


def test_the_mooncake_trace_has_its_published_figures() -> None:
    trace = read_trace(real("mooncake_synthetic_trace.jsonl.gz"))
    blocks = [block for request in trace.requests for block in request.hash_ids]
    assert (trace.format, len(trace), round(trace.duration_s)) == ("mooncake", 3993, 1022)
    assert 1 - len(set(blocks)) / len(blocks) == pytest.approx(0.64, abs=0.005)


def test_the_arena_trace_has_its_published_figures() -> None:
    trace = read_trace(real("arena_1500.csv.gz"))
    counts = list(trace.adapter_counts().values())
    assert (trace.format, len(trace), trace.duration_s, len(counts)) == ("slora", 1500, 600.0, 27)
    assert counts[0] / len(trace) == pytest.approx(0.20, abs=0.005)
    assert sum(counts[:10]) / len(trace) == pytest.approx(0.80, abs=0.01)
    assert {request.rank for request in trace.requests} == {8}


def test_the_burstgpt_sample_has_its_published_figures() -> None:
    path = real("BurstGPT_1_first400.csv")
    trace = read_trace(path, on_bad_row="skip")
    assert (trace.format, len(trace) + trace.num_bad_rows, trace.num_bad_rows) == ("burstgpt", 400, 17)
    assert len({request.arrival_s for request in trace.requests}) < len(trace)
    with pytest.raises(TraceError, match=r"BurstGPT_1_first400\.csv:22: Response tokens is 0"):
        read_trace(path)


def test_the_dirty_burstgpt_sample_is_taken_apart() -> None:
    trace = read_trace(real("burstgpt3_dirty.csv"), on_bad_row="skip")
    assert [request.prompt_tokens for request in trace.requests] == [100, 200]
    assert [row.line for row in trace.bad_rows] == [4, 5, 6, 7]
    assert [row.reason.split(" ")[0] for row in trace.bad_rows] == ["Elapsed", "Response", "2", "time"]


def test_what_is_no_request_trace_is_refused_in_one_line() -> None:
    with pytest.raises(TraceError, match="expected one of: azure") as caught:
        read_trace(real("maf_popularity_128.npy"))
    assert "\n" not in str(caught.value)
