"""`loraserve simulate` as a user runs it: tables, JSON, files, one line for what is wrong."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loraserve.cli.simulate_runs import SimulateOptions, prepare
from loraserve.errors import BadInputError
from loraserve.simulator.figures import Judging
from loraserve.simulator.from_profile import ClusterOptions
from loraserve.simulator.result_files import read_result
from loraserve.simulator.workload import SimulatedWorkload
from tests.support.cli import CODE, finish_cli, run_cli, start_cli

QUICK = ("simulate", "demo", "--replicas", "2")
TWO = (*QUICK, "--policy", "least-loaded,slora-random")


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_blocked(number: signal.Signals, pid: str) -> bool:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in status if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_policies_stand_side_by_side_and_ranks_below() -> None:
    ran = await run_cli(*TWO, "--per-rank", "--slo-ttft-ms", "60")
    assert (ran.exit_code, ran.stdout.count("least-loaded")) == (0, 1 + 6)
    assert "120 requests in 59 s, 5 adapters, 2 replicas; TTFT within 60 ms" in ran.stdout
    for name in ("goodput", "attainment", "TTFT p99", "TBT p95", "utilisation", "copies", "cold misses"):
        assert name in ran.stdout
    assert "rank 128" in ran.stdout


async def test_json_has_each_run_with_the_keys_of_vllm_bench_serve() -> None:
    tree = (
        await run_cli(
            *TWO,
            *("--seeds", "0,3", "--adapters", "4", "--ranks", "8,16", "--assign", "zipf", "--rate", "20"),
            *("--requests", "200", "--warmup", "1", "--per-adapter", "--json", "--jobs", "1"),
            *("--fail", "replica-1@3s for 2s"),
        )
    ).json()
    assert [(run["policy"], run["seed"]) for run in tree["runs"]] == [
        ("least-loaded", 0),
        ("least-loaded", 3),
        ("slora-random", 0),
        ("slora-random", 3),
    ]
    for run in tree["runs"]:
        assert run["overall"]["requests"] + run["warmup_requests"] == 200
        assert run["overall"]["p99_ttft_ms"] is not None
        assert set(run["per_rank"]) == {"8", "16"}
        assert len(run["per_adapter"]) == 4
        assert run["scenario"]["failures"] == 1
        assert run["simulated_requests_per_s"] > 0
    first, again = tree["runs"][0], (await run_cli(*QUICK, "--json")).json()["runs"][0]
    assert first["overall"] != again["overall"]


class Page(HTMLParser):
    """What a page would fetch, and whether it is well formed enough to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "h2":
            self.headings.append("")
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        if self.headings and not self.headings[-1]:
            self.headings[-1] = data


async def test_out_has_records_plots_and_a_page_that_fetches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = await run_cli(*TWO, "--out", str(out))
    assert (ran.exit_code, ran.stdout.splitlines()[-1]) == (0, f"report: {out}/index.html")
    runs = sorted(path for path in out.iterdir() if path.is_dir())
    assert [path.name for path in runs] == ["least-loaded-seed-0", "slora-random-seed-0"]
    assert [len(read_result(path)) for path in runs] == [120, 120]
    names = ("ttft_by_rank", "tbt_by_rank", "utilisation", "ranks")
    plots = [out / f"{name}.png" for name in ("ttft", "tbt", "attainment", "over_time")]
    plots += [path / f"{name}.png" for path in runs for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in plots)
    page = Page()
    page.feed((out / "index.html").read_text())
    assert len(page.sources) == 2 * len(plots)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert {"Policies", "By rank", "least-loaded", "slora-random"} <= set(page.headings)
    tree = json.loads((out / "summary.json").read_text())
    assert [run["folder"] for run in tree["runs"]] == [path.name for path in runs]
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("demo", "--policy", "nope"), "--policy: 'nope' is unknown; known: dlora, least-loaded"),
        (("nofile",), "nofile: "),
        (("demo", "--fail", "replica-1"), "expected such as 'replica-1@100s for 30s'"),
        (("demo", "--fail", "replica-9@1s for 1s"), "no replica 'replica-9'"),
        (("demo", "--adapters", "3", "--ranks", "512"), "takes 128 at most"),
        (("demo", "--warmup", "60"), "--warmup: 60 s leaves nothing"),
        (("demo", "--out", __file__), "is a file; expected a folder"),
    ],
)
async def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str) -> None:
    ran = await run_cli("simulate", *arguments)
    assert (ran.exit_code, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("error: ")
    assert line in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    # Far more than can be simulated before the signal, which comes once both runs have begun.
    size = ("--requests", "3000000", "--rate", "20")
    process = await start_cli(*TWO, *size, "--jobs", "2", "--out", str(out))
    assert process.stderr is not None
    assert b"simulate: " in await process.stderr.readline()
    assert len(names_in(tmp_path)) == 1
    process.send_signal(number)
    ran = await finish_cli(process)
    assert (ran.exit_code, ran.stdout, ran.stderr.splitlines()[-1]) == (130, "", "error: interrupted")
    assert names_in(tmp_path) == []


async def test_requests_that_fail_are_told_with_the_reason_of_one(tmp_path: Path) -> None:
    trace = tmp_path / "long.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,100,10\n1.0,10000000,1\n")
    ran = await run_cli("simulate", str(trace))
    assert ran.exit_code == 0
    assert "least-loaded: 1 failed; such as request 1: 10000000 prompt and 1 output tokens" in ran.stdout


async def test_a_failure_that_never_comes_is_told() -> None:
    ran = await run_cli(*QUICK, "--fail", "replica-1@900s for 1s", "--fail", "replica-1@9s for 1s")
    assert ran.exit_code == 0
    assert ran.stderr.count("never happens") == ran.stderr.count("replica-1@900s") == 1


async def test_an_interrupt_of_the_group_while_processes_start_tells_one_line() -> None:
    size = ("--requests", "100000", "--rate", "20")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CODE, *TWO, *size, "--jobs", "2"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        process_group=0,
    )
    # Both processes have been started, beside multiprocessing's own; none is through with its imports.
    for _ in range(2000):
        if len(children_of(process.pid)) == 3:
            break
        await asyncio.sleep(0.01)
    # They do not hear the terminal's Ctrl-C at all, however early it comes.
    assert all(is_blocked(signal.SIGINT, child) for child in children_of(process.pid)[1:])
    os.killpg(process.pid, signal.SIGINT)
    ran = await finish_cli(process)
    assert (ran.exit_code, ran.stdout, ran.stderr.splitlines()) == (130, "", ["error: interrupted"])


def test_simulating_imports_nothing_heavy() -> None:
    code = (
        "import sys; from loraserve.cli.main import run; sys.argv = ['loraserve', 'simulate', 'demo']\n"
        "try:\n    run()\n"
        "finally:\n    print([name for name in ('ray', 'torch', 'vllm', 'grpc', 'matplotlib', 'pyarrow')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


OPTIONS = SimulateOptions(
    workload=SimulatedWorkload(source="demo"),
    cluster=ClusterOptions(),
    judging=Judging(),
    profile="a100-llama2-7b-bgmv",
    policies=("least-loaded",),
    routings=("least-outstanding",),
    seeds=(0,),
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(OPTIONS, routings=("nope",)), "--routing: 'nope' is unknown; known: auto, dlora"),
        (replace(OPTIONS, profile="nope"), "--profile nope: no such profile"),
        (replace(OPTIONS, seeds=tuple(range(10_001))), "10001 runs"),
        (replace(OPTIONS, cluster=ClusterOptions(num_replicas=0)), "--replicas: 0"),
        (replace(OPTIONS, cluster=ClusterOptions(kernel="nope")), "--kernel: nope; expected one of padded"),
        (replace(OPTIONS, cluster=ClusterOptions(speed=0)), "speed: 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_is(
    options: SimulateOptions, message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        prepare(options)
