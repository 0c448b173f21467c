"""`loraserve replay` prints tables or JSON, writes a report, and ends in order when interrupted."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loraserve.errors import BadInputError, OverloadedError
from tests.support.cli import finish_cli, run_cli, start_cli
from tests.support.fake_router import FakeRouter, fake_router
from traces.records import Outcome, read_records

REPLAY = ("replay", "demo", "--speedup", "40")


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with fake_router() as router:
        for name, rank in (("a", 8), ("b", 64)):
            await router.add(name, rank)
        yield router


async def test_json_carries_the_figures_and_nothing_else_is_on_stdout(router: FakeRouter) -> None:
    ran = await run_cli(*REPLAY, "--limit", "20", "--address", router.address, "--json")
    tree = ran.json()
    assert ran.exit_code == 0
    assert (tree["sent"], tree["overall"]["completed"], tree["interrupted"]) == (20, 20, False)
    assert tree["overall"]["p99_ttft_ms"] > 0
    assert tree["trace"]["requests"] == 20
    assert tree["options"]["speedup"] == 40
    assert "20 sent" in ran.stderr


async def test_tables_are_per_rank_and_the_report_is_written(router: FakeRouter, tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    ran = await run_cli(*REPLAY, "--address", router.address, "--warmup-requests", "20", "--out", str(out))
    assert ran.exit_code == 0
    for text in ("TTFT p50", "TPOT p50", "attainment", "base", "64", "pacing error", "100 of 100"):
        assert text in ran.stdout
    assert len(read_records(out / "records.jsonl")) == 120
    assert (out / "report.html").stat().st_size > 1000
    assert list(out.glob("*.png"))


async def test_bad_rows_are_refused_with_their_line_or_counted(router: FakeRouter, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,4,5\nx,y,z\n")
    refused = await run_cli("replay", str(path), "--address", router.address)
    assert refused.exit_code == 2
    assert f"{path}:3:" in refused.stderr
    skipped = await run_cli("replay", str(path), "--address", router.address, "--on-bad-row", "skip")
    assert skipped.exit_code == 0
    assert "1 bad rows skipped: line 3" in skipped.stdout
    both = await run_cli("replay", str(path), "--address", router.address, "--on-bad-row", "skip", "--json")
    assert [row["line"] for row in both.json()["trace"]["bad_rows"]] == [3]


async def test_a_replay_without_one_answer_has_failed(router: FakeRouter) -> None:
    router.refusal = OverloadedError("full")
    ran = await run_cli(*REPLAY, "--limit", "3", "--address", router.address, "--json")
    assert ran.exit_code == 1
    assert ran.json()["overall"]["refused"] == 3
    assert ran.stderr.endswith("error: no request was answered in full; the first: full\n")


async def test_failures_that_differ_in_a_number_are_told_once(router: FakeRouter) -> None:
    class CountedError(BadInputError):
        def __str__(self) -> str:
            return f"prompt: {next(lengths)} tokens leave no room for output; at most 9 in all"

    lengths = itertools.count(2000)
    router.refusal = CountedError()
    ran = await run_cli(*REPLAY, "--limit", "3", "--address", router.address)
    (line,) = [line for line in ran.stdout.splitlines() if "leave no room" in line]
    assert line.startswith("3 failed: for example ")
    assert "prompt: 200" in line
    assert "--max-prompt-tokens" in line
    router.refusal = OverloadedError("full")
    ran = await run_cli(*REPLAY, "--limit", "3", "--address", router.address)
    assert "3 refused: full" in ran.stdout.splitlines()


async def test_ctrl_c_ends_the_replay_and_keeps_what_was_measured(router: FakeRouter, tmp_path: Path) -> None:
    process = await start_cli("replay", "demo", "--address", router.address, "--out", str(tmp_path), "--json")
    async with asyncio.timeout(30):
        while len(router.requests) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    ran = await finish_cli(process)
    assert ran.exit_code == 130
    tree = ran.json()
    assert tree["interrupted"]
    assert tree["sent"] + tree["not_sent"] == 120
    records = read_records(tmp_path / "records.jsonl")
    assert len(records) == tree["sent"] >= 2
    assert {record.outcome for record in records} <= {Outcome.OK, Outcome.CANCELLED}
    await router.wait_idle()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--speedup", "0"), "error: --speedup: "),
        (("--assign", "best"), "error: --assign: best is unknown"),
        (("--adapters", "a,zzz"), "error: --adapters: not registered: zzz; registered: a, b"),
        (("--slo-ttft-ms", "0"), "error: --slo-ttft-ms, --slo-tbt-ms: "),
        (("--timeout", "-1"), "error: --timeout: "),
        (("--out", "/dev/null/x"), "error: --out: /dev/null/x: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
async def test_wrong_flags_are_bad_input(router: FakeRouter, arguments: tuple[str, ...], line: str) -> None:
    ran = await run_cli(*REPLAY, "--address", router.address, "--json", *arguments)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(line)
    assert ran.stderr.count("\n") == 1
    assert router.requests == []
