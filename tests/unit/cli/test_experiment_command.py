"""`loraserve simulate EXPERIMENT`: what it refuses, and how it ends."""

import asyncio
import signal
from pathlib import Path

import pytest

from tests.support.cli import finish_cli, run_cli, start_cli

SMALL = """
policies = ["least-loaded"]
rates = [4.0]
replicas = [2]
[cluster]
duration_s = 10
[[traces]]
name = "u"
source = "preset:loraserve-uniform"
"""


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("experiment:none",), "experiment:none: no such experiment; those there are: "),
        (("none.toml",), "none.toml: cannot read the experiment: No such file or directory"),
        (("small.toml", "--policy", "optimal"), "--policy: small.toml is an experiment and says that itself"),
        (("small.toml", "--out", "small.toml"), "--out: small.toml: is a file; expected a folder"),
        (("small.toml", "--out", "small.toml/x"), "--out: small.toml: is a file; expected a folder"),
        (("none.csv", "--traces", "."), "--traces: none.csv is no experiment; expected a .toml file"),
    ],
)
async def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    ran = await run_cli("simulate", *arguments)
    assert ran.exit_code == 2
    assert ran.stderr.startswith(f"error: {line}")
    assert ran.stderr.count("\n") == 1
    assert names_in(tmp_path) == {"small.toml"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_while_the_report_is_drawn_leaves_no_half_of_one(
    number: signal.Signals, tmp_path: Path
) -> None:
    path, out = tmp_path / "small.toml", tmp_path / "out"
    path.write_text(SMALL)
    process = await start_cli("simulate", str(path), "--out", str(out))
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"drawing the report" not in await process.stderr.readline():
            assert process.returncode is None
    process.send_signal(number)
    ran = await finish_cli(process)
    assert ran.exit_code == 130
    assert ran.stderr == "error: interrupted\n"
    assert names_in(out) <= {"jobs", "results.json"}
    assert names_in(tmp_path) == {"small.toml", "out"}
    again = await run_cli("simulate", str(path), "--out", str(out))
    assert "1 of 1 jobs, 1 from an earlier run" in again.stderr
    assert names_in(out) == {"jobs", "results.json", "report.html", "plots"}


async def test_two_runs_into_one_folder_end_with_one_whole_result(tmp_path: Path) -> None:
    path, out = tmp_path / "small.toml", tmp_path / "out"
    path.write_text(SMALL)
    processes = [await start_cli("simulate", str(path), "--out", str(out)) for _ in range(2)]
    ran = [await finish_cli(process) for process in processes]
    assert [one.exit_code for one in ran] == [0, 0], [one.stderr for one in ran]
    assert ran[0].stdout == ran[1].stdout
    assert names_in(out) == {"jobs", "results.json", "report.html", "plots"}
    assert len(names_in(out / "jobs")) == 1
