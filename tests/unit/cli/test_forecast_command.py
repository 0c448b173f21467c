"""`loraserve forecast`: errors worked by hand on a small trace, its files, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loraserve.cli.main import make_app
from placement.demand import FORECASTERS

HEADER = "req_id,adapter,prompt_len,output_len,req_time\n"
# Windows of 10 s. Adapter x: 100, 200, 300 tokens; y: 100 in the first, 50 in the third. The last request
# only ends the third window.
ROWS = (
    "0,x-rank-8-1,60,40,0.0\n1,y-rank-8-2,50,50,1.0\n2,x-rank-8-1,100,100,12.0\n"
    "3,x-rank-8-1,200,100,25.0\n4,y-rank-8-2,25,25,26.0\n5,,5,5,30.0\n"
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["forecast", *map(str, arguments)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + ROWS)
    return path


def test_errors_of_the_naive_forecast_worked_by_hand(trace: Path) -> None:
    """Two forecasts. For 10 to 20 s: x 10 came 20, y 10 came 0. For 20 to 30 s: x 20 came 30, y (forgotten)
    0 came 5. So |error| 10 + 10 + 10 + 5 = 35 of 55 tokens per second that came, in 4 pairs."""
    done = run(trace, "--epoch", 10, "--forecasters", "last", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["adapters"], found["epochs"], found["requests"]) == (2, 2, 6)
    figures = found["forecasters"]["last"]
    assert figures == {
        "epochs": 2,
        "pairs": 4,
        "wape": pytest.approx(35 / 55),
        "mae_tokens_per_s": pytest.approx(35 / 4),
        "bias": pytest.approx(-15 / 55),
        "under_share": pytest.approx(25 / 55),
        "coverage": pytest.approx(1 / 4),
        "total_wape": pytest.approx(15 / 55),
    }


def test_people_get_every_forecaster_the_best_first(trace: Path) -> None:
    done = run(trace, "--epoch", 10)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("2 adapters, 2 forecasts of 10 s each, from windows of 10 s")
    rows = [line.split() for line in lines[2 : 2 + len(FORECASTERS)]]
    assert sorted(row[0] for row in rows) == sorted(FORECASTERS)
    errors = [float(row[1].rstrip("%")) for row in rows]
    assert errors == sorted(errors)
    assert ["last", "63.6%", "8.75", "-27.3%", "45.5%", "25.0%", "27.3%"] in rows


def test_files_hold_the_figures_the_epochs_and_a_plot(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(trace, "--epoch", 10, "--forecasters", "ema,last", "--out", out, "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told.pop("plot") == str(out / "forecast.png")
    assert json.loads((out / "forecast.json").read_text()) == told
    with (out / "epochs.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["end_s", "came_tokens_per_s", "ema", "last"]
    assert [[float(value) for value in row] for row in rows[1:]] == [[20, 20, 20, 20], [30, 35, 20, 20]]
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("demo",), "--epoch: bundled:demo has 0 whole epochs of 60 s in its 59.3401 s; expected from 2 to"),
        (("demo", "--epoch", 10, "--forecasters", "oracle"), "--forecasters: 'oracle' is unknown; known: "),
        (("demo", "--epoch", 10, "--forecasters", ","), "expected one or more names with commas between"),
        (("demo", "--epoch", -1), "--epoch: -1.0; expected seconds above 0"),
        (("demo", "--epoch", 10, "--quantile", 1), "--quantile: 1.0; expected from 0.5 to below 1"),
        (("demo", "--epoch", 10, "--out", __file__), "is a file; expected a folder"),
        (("nofile",), "nofile: cannot read the trace"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[object, ...], line: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert line in done.stderr


def test_a_trace_without_adapters_is_told_how_to_get_some(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "0,,5,6,0.0\n1,,5,6,60.0\n")
    done = run(path, "--epoch", 10)
    assert done.exit_code == 2
    assert "names no adapters; give it some with --adapters" in done.stderr
    assert run(path, "--epoch", 10, "--adapters", 2).exit_code == 0
