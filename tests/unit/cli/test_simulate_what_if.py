"""`loraserve simulate` asked what if, and about traces that leave something open."""

from pathlib import Path

from tests.support.cli import run_cli

QUICK = ("simulate", "demo", "--replicas", "3")


async def test_questions_change_every_run_and_are_told_with_the_figures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = await run_cli(
        *QUICK,
        *("--seeds", "0,1", "--add-adapters", "5x64@50%", "--scale", "rank-*=2", "--scale", "base=0"),
        *("--lose", "1@20s", "--jobs", "1", "--json", "--out", str(out)),
    )
    tree = ran.json()
    lines = [
        "the requests of rank-* times 2",
        "the requests of base times 0",
        "5 more adapters of rank 64, together with 50 % of the requests there are, on top",
        "1 replica lost for good, 20 s into the trace",
    ]
    assert tree["what_if"] == lines
    assert [run["overall"]["requests"] for run in tree["runs"]] == [330, 330]
    for run in tree["runs"]:
        assert (run["scenario"]["adapters"], run["scenario"]["failures"]) == (10, 1)
    assert tree["runs"][0]["overall"] != tree["runs"][1]["overall"]
    assert "; ".join(lines) in (out / "index.html").read_text()
    plain = await run_cli(*QUICK, "--lose", "1")
    assert "what if: 1 replica lost for good, 33.3 % of the way into the trace" in plain.stdout


async def test_a_trace_without_ranks_and_lengths_takes_both_from_options(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,adapter_id\n" + "".join(f"{60 * n},L{n % 7 // 3}\n" for n in range(70)))
    ran = await run_cli(
        *("simulate", str(path), "--ranks", "8,16,64", "--correlation", "-1", "--duration", "3000"),
        *("--speedup", "60", "--lengths", "fixed:40,20", "--per-rank", "--json"),
    )
    (run,) = ran.json()["runs"]
    assert run["scenario"]["trace"] == f"{path}, lengths of fixed"
    assert (run["overall"]["requests"], run["overall"]["total_output_tokens"]) == (50, 50 * 20)
    # The first two adapters come three times in seven, the third once.
    assert {rank: one["requests"] for rank, one in run["per_rank"].items()} == {"8": 22, "16": 21, "64": 7}


async def test_a_question_that_cannot_be_asked_is_one_line() -> None:
    ran = await run_cli(*QUICK, "--scale", "nobody=2")
    assert ran.exit_code == 2
    assert ran.stderr.startswith("error: --scale: 'nobody' has no requests; the trace's adapters are rank-8")
    assert ran.stderr.count("\n") == 1
