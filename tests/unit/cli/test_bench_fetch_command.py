"""`loraserve bench fetch` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.support.cli import run_cli


async def test_a_run_prints_one_object_and_writes_its_records_and_the_plot(tmp_path: Path) -> None:
    ran = await run_cli(
        "bench", "fetch", "--sizes", "64KiB,256KiB", "--repeats", "2", "--source", "tcp",
        "--source", "origin", "--json", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert ran.exit_code == 0, ran.stderr
    told = ran.json()
    assert [(row["label"], row["source"]) for row in told["rows"]] == [
        (label, source) for label in ("64KiB", "256KiB") for source in ("tcp", "origin")
    ]
    assert all(row["bytes_per_s"] > 0 for row in told["rows"])
    assert set(told["peer_faster_from_bytes"]) == {"tcp"}
    assert told["repetitions"] == 2
    assert sorted(Path(file).name for file in told["files"]) == ["fetch.json", "fetch.png", "fetch.svg"]
    records = json.loads((tmp_path / "out" / "fetch.json").read_text())
    assert len(records["samples"]) == 8


async def test_tables_say_from_which_size_a_peer_pays_and_nothing_is_cut_off() -> None:
    ran = await run_cli("bench", "fetch", "--sizes", "64KiB", "--repeats", "1")
    assert ran.exit_code == 0, ran.stderr
    assert "Until resident" in ran.stdout
    assert "…" not in ran.stdout
    assert "a peer over tcp against a folder, in the page cache: " in ran.stdout
    assert "sha256_bytes_per_s" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sizes", "big"), "--sizes: got 'big'; expected such as 512KiB"),
        (("--sizes", ""), "--sizes: got ''; expected such as 512KiB"),
        (("--ranks", ""), "--ranks: got ''; expected numbers from 1 to 512"),
        (("--sizes", "1MiB", "--ranks", "8"), "--sizes and --ranks: give one of them"),
        (("--sizes", "1MiB", "--engine", "vllm"), "give --ranks, not --sizes"),
        (("--engine", "gpt"), "--engine: got 'gpt'; expected vllm or emulated"),
        (("--ranks", "0"), "--ranks: got '0'; expected numbers from 1 to 512"),
        (("--ranks", "8,x"), "--ranks: got 'x'"),
        (("--ranks", "8", "--model", "nowhere"), "nowhere: no such folder"),
        (("--model", "nowhere"), "--model: adapters of which ranks?"),
        (("--ranks", "8", "--hidden", "100"), "hidden_size is 100"),
        (("--source", "ftp"), "--source: got 'ftp'; expected one of ucx, tcp"),
        (("--out", "/dev/null/x"), "--out: /dev/null/x: cannot be made"),
        (("--folder", "/dev/null/x"), "--folder: /dev/null/x: no such folder"),
    ],
)
async def test_bad_arguments_are_one_line_and_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    ran = await run_cli("bench", "fetch", *arguments)
    assert ran.exit_code == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert says in ran.stderr
