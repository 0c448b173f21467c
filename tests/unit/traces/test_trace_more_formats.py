"""The formats without lengths, the synthesised ones, the newer layouts, and Parquet."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from traces import TraceError, read_trace
from traces.columns import TraceColumns, trace_of
from traces.fill import UNKNOWN, Fill
from traces.formats import FORMATS
from traces.formats.servegen import SERVEGEN
from traces.read import read_columns
from traces.write import write_columns

REAL = Path(__file__).parents[4] / "shared" / "traces"

AZURE_2025 = (
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
    "2024-10-15T12:00:00.269Z,0,770,491\n2024-10-15T12:00:05.819Z,1,949,126\n"
)
QWEN = (
    '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 33, "output_length": 132,'
    ' "type": "text", "turn": 1, "hash_ids": [1089, 1090, 1091]}\n'
    '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 62.5, "input_length": 20, "output_length": 8,'
    ' "type": "text", "turn": 2, "hash_ids": [1089, 7]}\n'
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens,pd_ratio\n0.5,10,20,0.5\n2.0,30,40.0,0.75\n"
FUNCTIONS_2019 = "HashOwner,HashApp,HashFunction,Trigger,1,2,3\no,a,f,http,0,2,0\no,a,g,queue,1,4,1\n"
FUNCTIONS_2021 = "app,func,end_timestamp,duration\na,f,10.5,0.5\na,g,12.25,12.0\na,f,11.0,0.25\n"
GENAI = "arrival_s,adapter_id,num_adapters\n0,,0\n5,L1,1\n5,L2|L1,2\n9,L9|L3,2\n"
TOPPINGS = "Number of Events: 3, Duration: 3, Rate: 1\n==========\n0.250\n0.500\n1.750\n"
SERVEGEN_CLIENT = "0,0,0,,0,0\n600,2.0,1.0,Gamma,1.0,0.4\n1200,1.0,0.5,Weibull,2.0,1.0\n1800,0,0,,0,0\n"
ALL = {
    "azure": AZURE_2025,
    "qwen": QWEN,
    "vidur": VIDUR,
    "functions2019": FUNCTIONS_2019,
    "functions2021": FUNCTIONS_2021,
    "genai": GENAI,
    "toppings": TOPPINGS,
    "servegen": SERVEGEN_CLIENT,
}


def read(tmp_path: Path, text: str, fill: Fill | None = UNKNOWN) -> TraceColumns:
    path = tmp_path / "trace"
    path.write_text(text)
    return read_columns(path, fill=fill)


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real trace {name} is not on this machine (looked in ../shared/traces)")
    return path


def adapter_names(columns: TraceColumns) -> list[str | None]:
    return [None if place < 0 else columns.adapters[place].name for place in columns.adapter]


@pytest.mark.parametrize("name", list(ALL))
def test_each_is_known_by_its_content_and_taken_for_no_other(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, ALL[name]).format == name
    first = ALL[name].splitlines()[0]
    assert [known.name for known in FORMATS.values() if known.matches(first)] == [name]


def test_azure_2025_has_images_that_are_not_used(tmp_path: Path) -> None:
    columns = read(tmp_path, AZURE_2025)
    assert columns.arrival_s.tolist() == pytest.approx([0.0, 5.55], abs=1e-9)
    assert (columns.prompt_tokens.tolist(), columns.output_tokens.tolist()) == ([770, 949], [491, 126])


def test_qwen_counts_seconds_and_blocks_of_16_tokens(tmp_path: Path) -> None:
    columns = read(tmp_path, QWEN)
    assert columns.arrival_s.tolist() == [0.0, 62.5 - 61.114]
    assert (columns.hash_block_tokens, columns.prompt_tokens.tolist()) == (16, [33, 20])
    assert [request.hash_ids for request in trace_of(columns).requests] == [(1089, 1090, 1091), (1089, 7)]


def test_vidur_is_read_with_or_without_more_columns(tmp_path: Path) -> None:
    columns = read(tmp_path, VIDUR)
    assert columns.arrival_s.tolist() == [0.0, 1.5]
    assert (columns.prompt_tokens.tolist(), columns.output_tokens.tolist()) == ([10, 30], [20, 40])


def test_functions_2021_arrive_at_the_end_less_the_duration_and_are_sorted(tmp_path: Path) -> None:
    columns = read(tmp_path, FUNCTIONS_2021)
    assert columns.arrival_s.tolist() == [0.0, 9.75, 10.5]
    assert adapter_names(columns) == ["a/g", "a/f", "a/f"]


def test_functions_2019_spread_each_minutes_invocations_inside_it(tmp_path: Path) -> None:
    columns = read(tmp_path, FUNCTIONS_2019, Fill(unknown=True, spread="even"))
    # g at 30; f at 60 + 15, 45; g at 60 + 7.5, 22.5, 37.5, 52.5; g at 150: from the first on.
    assert columns.arrival_s.tolist() == [0, 37.5, 45, 52.5, 67.5, 75, 82.5, 120]
    assert adapter_names(columns) == [f"a/{name}" for name in "ggfggfgg"]
    drawn = [read(tmp_path, FUNCTIONS_2019, Fill(unknown=True, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0].arrival_s.tolist() == drawn[1].arrival_s.tolist() != drawn[2].arrival_s.tolist()
    begin_s = drawn[0].arrival_s[1:].min()
    assert 0 < begin_s <= 120
    path = tmp_path / "trace"
    assert len(read_columns(path, fill=UNKNOWN, duration_s=60.0)) == 1
    assert len(read_columns(path, fill=Fill(unknown=True, spread="even"), limit=3)) == 3


def test_genai_takes_the_first_of_several_adapters_and_keeps_the_names_of_all(tmp_path: Path) -> None:
    columns = read(tmp_path, GENAI)
    assert adapter_names(columns) == [None, "L1", "L2", "L9"]
    assert [one.name for one in columns.adapters] == ["L1", "L2", "L9", "L3"]


def test_toppings_draws_adapters_by_the_shares_beside_it(tmp_path: Path) -> None:
    assert adapter_names(read(tmp_path, TOPPINGS)) == [None, None, None]
    path = tmp_path / "x_arrivals_4.txt"
    path.write_text("====\n" + "\n".join(str(at / 100) for at in range(4000)) + "\n")
    np.save(tmp_path / "x_popularity_4.npy", np.array([0.0, 0.5, 0.25, 0.25]))
    columns = read_columns(path, fill=UNKNOWN)
    shares = {name: adapter_names(columns).count(name) / 4000 for name in set(adapter_names(columns))}
    assert shares == {
        "adapter-1": pytest.approx(0.5, abs=0.05),
        "adapter-2": pytest.approx(0.25, abs=0.05),
        "adapter-3": pytest.approx(0.25, abs=0.05),
    }
    np.save(tmp_path / "x_popularity_4.npy", np.array([[1.0]]))
    with pytest.raises(TraceError, match=r"x_popularity_4\.npy: no popularity .* not one row of numbers"):
        read_columns(path, fill=UNKNOWN)


def servegen_client(tmp_path: Path, dataset: object) -> Path:
    path = tmp_path / "chunk-0-trace.csv"
    path.write_text(SERVEGEN_CLIENT)
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps(dataset))
    return path


def test_servegen_draws_arrivals_and_lengths_window_by_window(tmp_path: Path) -> None:
    lengths = {
        "0": {"input_tokens": "{10: 0.5, 30: 0.5}", "output_tokens": "{0: 0.25, 7: 0.75}"},
        "1200": {"input_tokens": "{99: 1.0}", "output_tokens": "{5: 1e-3}"},
    }
    path = servegen_client(tmp_path, lengths)
    columns = read_columns(path)
    first = columns.arrival_s < 600 - 600 / 1200
    assert 1000 < int(first.sum()) < 1400
    assert len(columns) - int(first.sum()) == pytest.approx(600, abs=60)
    gaps_s = np.diff(columns.arrival_s[~first][2:])
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(0.52, abs=0.08)  # Weibull of shape 2
    assert set(columns.prompt_tokens[first]) == {10, 30}
    assert set(columns.output_tokens[first]) == {1, 7}
    assert set(columns.prompt_tokens[-500:]) == {99}
    assert trace_of(read_columns(path)) == trace_of(columns)
    assert len(read_columns(path, fill=Fill(seed=1))) != len(columns)


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ([], "no usable lengths"),
        ({}, "it has no window with lengths"),
        ({"0": {"input_tokens": "{1: 0.5}"}}, "KeyError"),
        ({"0": {"input_tokens": "{1: 0.5}", "output_tokens": "__import__('os')"}}, "no probabilities"),
        ({"x": {"input_tokens": "{1: 0.5}", "output_tokens": "{1: 0.5}"}}, "ValueError"),
    ],
)
def test_a_servegen_data_set_that_is_none_is_refused(tmp_path: Path, dataset: object, says: str) -> None:
    with pytest.raises(TraceError, match=f"chunk-0-dataset.json: .*{says}"):
        read_columns(servegen_client(tmp_path, dataset))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("0,1,1,Gauss,1,1", "distribution is 'Gauss'; expected Gamma, Weibull or nothing"),
        ("0,1,1,Gamma,0,1", "shape is 0; expected 0.001 to"),
        ("600,1,1,Gamma,1,1", "start 600 is not after the start before it, 600"),
        ("1200,1,1,Gamma", "4 fields; expected 6"),
        ("1200,-1,1,Gamma,1,1", "rate is '-1'; expected a number from 0"),
    ],
)
def test_a_servegen_window_that_is_none_is_a_bad_row(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(TraceError, match=f"trace:3: {says}"):
        read(tmp_path, f"0,0,0,,0,0\n600,1,1,Gamma,1,1\n{row}\n")
    assert SERVEGEN.has_header is False


def test_a_format_without_lengths_says_so_and_takes_them_as_asked(tmp_path: Path) -> None:
    for name in ("functions2019", "functions2021", "genai", "toppings", "servegen"):
        with pytest.raises(TraceError, match=rf"{name} tells no numbers of tokens; give .*--lengths-from"):
            read(tmp_path, ALL[name], None)
    with pytest.raises(TraceError, match="tells no numbers of tokens"):
        read(tmp_path, GENAI, Fill(prompt_tokens=5))
    fixed = read(tmp_path, GENAI, Fill(prompt_tokens=5, output_tokens=6))
    assert (set(fixed.prompt_tokens), set(fixed.output_tokens)) == ({5}, {6})
    other = read(tmp_path, VIDUR)
    text = "arrival_s,adapter_id\n" + "".join(f"{at},\n" for at in range(200))
    drawn = read(tmp_path, text, Fill(lengths_from=other, seed=3))
    pairs = set(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True))
    assert pairs == {(10, 20), (30, 40)}
    again = read(tmp_path, text, Fill(lengths_from=other, seed=3))
    assert again.prompt_tokens.tolist() == drawn.prompt_tokens.tolist()
    with pytest.raises(TraceError, match="are not known; a trace with 0 tokens is not written"):
        write_columns(read(tmp_path, GENAI), tmp_path / "out.csv")
    with pytest.raises(TraceError, match="0 prompt tokens are not possible"):
        Fill(prompt_tokens=0)


def test_lengths_that_the_trace_has_are_not_replaced(tmp_path: Path) -> None:
    columns = read(tmp_path, VIDUR, Fill(prompt_tokens=5, output_tokens=6))
    assert columns.prompt_tokens.tolist() == [10, 30]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (
            {
                "TIMESTAMP": pa.array([0, 1_500_000], pa.timestamp("us")),
                "ContextTokens": [3, 4],
                "GeneratedTokens": [5.0, 6.0],
            },
            "azure",
        ),
        (
            {"arrived_at": [1.0, 2.5], "num_prefill_tokens": [3, 4], "num_decode_tokens": [5, 6],
             "note": ["a,b", None]},
            "vidur",
        ),
        (
            {"req_id": [0, 1], "adapter": ["x-rank-8-1", None], "prompt_len": [3, 4], "output_len": [5, 6],
             "req_time": [0.0, 1.5]},
            "slora",
        ),
        (
            {"timestamp": [0, 1500], "input_length": [3, 4], "output_length": [5, 6],
             "hash_ids": [[1, 2], []]},
            "mooncake",
        ),
        (
            {"chat_id": [1, 2], "timestamp": [0.0, 1.5], "input_length": [3, 4], "output_length": [5, 6]},
            "qwen",
        ),
    ],
)  # fmt: skip
def test_parquet_with_another_formats_columns_is_that_format(
    tmp_path: Path, table: dict[str, object], name: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "x")
    columns = read_columns(tmp_path / "x")
    assert columns.format == name
    assert columns.arrival_s.tolist() == [0.0, 1.5]
    assert (columns.prompt_tokens.tolist(), columns.output_tokens.tolist()) == ([3, 4], [5, 6])


def test_real_samples_of_the_functions_traces_are_read() -> None:
    day = read_columns(real("maf2019_invocations_sample.csv"), fill=UNKNOWN)
    assert (len(day), len(day.adapters)) == (4525, 4)
    ends = read_trace(real("maf2021_sample_200.csv"), fill=UNKNOWN)
    assert len(ends) == 199
    raw = [line.split(",") for line in real("maf2021_sample_200.csv").read_text().splitlines()[1:]]
    begins = sorted(float(row[2]) - float(row[3]) for row in raw)
    assert [one.arrival_s for one in ends.requests] == [begin - begins[0] for begin in begins]


def test_the_toppings_sample_takes_the_shares_beside_it() -> None:
    columns = read_columns(real("maf_arrivals_128.txt"), fill=UNKNOWN)
    assert (columns.format, len(columns), columns.duration_s) == ("toppings", 434, 287.75)
    assert 1 < len(columns.adapters) <= 128


def test_the_servegen_client_has_its_rate_and_its_lengths() -> None:
    path = real("servegen_deepseek-r1_client0_trace.csv")
    columns = read_columns(path)
    expected = sum(float(line.split(",")[1]) * 600 for line in path.read_text().splitlines())
    assert len(columns) == pytest.approx(expected, rel=0.1)
    assert columns.prompt_tokens.min() >= 1
    assert columns.output_tokens.mean() > columns.prompt_tokens.mean()  # it reasons
