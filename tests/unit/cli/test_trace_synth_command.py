"""`loraserve trace synth`: the file it writes, what it says, how it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from loraserve.cli.trace import trace_app
from traces.read import read_columns
from traces.synthesis import PRESETS, Overrides, workload


def run(*arguments: str) -> Result:
    return CliRunner().invoke(trace_app, ["synth", *arguments])


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_the_file_holds_the_workload(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"trace{ending}"
    result = run("loraserve-skew", "--duration", "20", "--adapters", "10", "--seed", "5", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert "560 requests in 20 s (28/s), 10 adapters of rank 8, 16, 32, 64, 128" in result.stdout
    made = workload("loraserve-skew", Overrides(duration=20.0, adapters=10, seed=5))
    read = read_columns(out)
    assert np.array_equal(read.prompt_tokens, made.prompt_tokens)
    assert np.array_equal(read.output_tokens, made.output_tokens)
    if ending == ".jsonl":
        # Mooncake's layout has milliseconds and no adapters.
        assert np.allclose(read.arrival_s, made.arrival_s, atol=1e-3)
        return
    assert np.array_equal(read.arrival_s, made.arrival_s)
    names = [made.adapters[place] for place in made.adapter]
    assert [read.adapters[place] for place in read.adapter] == names


def test_every_option_reaches_the_workload(tmp_path: Path) -> None:
    out = tmp_path / "trace.csv"
    asked = {
        "requests": 300,
        "duration": 30.0,
        "adapters": 6,
        "ranks": "weighted:8=2/64=1",
        "correlation": -1.0,
        "arrivals": "gamma:cv=2",
        "popularity": "zipf:exponent=1.5",
        "drift": "rotate:every_s=5",
        "lengths": "fixed:prompt_tokens=900,output_tokens=90",
        "max_prompt": 500,
        "max_output": 60,
        "over": "clip",
        "base_share": 0.25,
        "seed": 9,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    result = run("slora", *flags, "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    spec = {name.replace("-", "_"): value for name, value in said["spec"].items()}
    assert spec == asked | {"name": "slora", "ranks": "weighted:weights_of=8=2/64=1"}
    assert (said["requests"], said["adapters"], said["ranks"]) == (300, 6, [8, 64])
    assert said["base_share"] == pytest.approx(0.25, abs=0.1)
    assert (said["prompt_tokens_mean"], said["output_tokens_mean"]) == (500, 60)


def test_the_list_names_every_preset_and_law() -> None:
    text = run("--list")
    assert text.exit_code == 0
    assert all(f"  {name} " in text.stdout for name in PRESETS)
    assert "  gamma:cv=1\n" in text.stdout
    listed = json.loads(run("--list", "--json").stdout)
    assert set(listed["presets"]) == set(PRESETS)
    assert set(listed["laws"]) == {"arrivals", "popularity", "drift", "lengths", "ranks"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("slora",), "error: --out is missing"),
        (("slora", "--out", "x.txt"), "should end in .csv"),
        (("none", "--out", "x.csv"), "no preset is called 'none'"),
        (("--arrivals", "gama", "--out", "x.csv"), "arrivals: 'gama' is unknown; there are: even"),
        (("--popularity", "file:nowhere", "--out", "x.csv"), "nowhere: is not there"),
        (("--rate", "nan", "--out", "x.csv"), "the rate is nan"),
        (("--requests", "9", "--out", "nowhere/x.csv"), "--out: nowhere/x.csv: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
