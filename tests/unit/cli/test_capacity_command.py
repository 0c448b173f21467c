"""`loraserve capacity` as a user runs it: search, answer, JSON, page, one line for what is wrong."""

import asyncio
import inspect
import json
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loraserve.cli.capacity import CLUSTER, SHARED, WORKLOAD, capacity
from loraserve.cli.shared_options import taking_options
from loraserve.cli.simulate import simulate
from loraserve.simulator.from_profile import ClusterOptions
from loraserve.simulator.workload import SimulatedWorkload
from tests.support.cli import finish_cli, run_cli, start_cli

QUICK = ("capacity", "demo", "--rate", "20", "--requests", "240", "--seeds", "0,1", "--jobs", "1")
SLO = ("--slo", "ttft_p95<400ms,tbt_p95<60ms,attainment>0.9")


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_running(pid: str) -> bool:
    """Whether there is such a process, other than one that has ended and waits to be told of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Page(HTMLParser):
    """What a page would fetch, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.headings: list[str] = []
        self._is_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_heading = tag == "h2"
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        if self._is_heading:
            self.headings.append(data)
        self._is_heading = False


async def test_the_search_is_shown_and_the_answer_said() -> None:
    ran = await run_cli(*QUICK, *SLO)
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    head = next(line for line in lines if line.startswith("policy"))
    assert "TTFT p95 by seed" in head
    answer = next(line for line in lines if line.startswith("optimal: "))
    replicas = int(answer.split()[1])
    assert "hold" in answer
    assert "with 2 of 2 seeds (so, at 95 %, at least 22 % of all)" in ran.stdout
    tried = {int(line.split()[1]) for line in lines[1:] if line.startswith("optimal ")}
    assert {number for number in (replicas - 1, replicas, replicas + 1) if number} <= tried
    assert ran.stderr.count("capacity: ") == 2 * len(tried)
    assert ran.stderr.count("seed 1") == len(tried)


async def test_json_is_one_object_and_a_page_fetches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = await run_cli(
        *(*QUICK, *SLO, "--json", "--out", str(out), "--price", "2.5", "--gpus-per-replica", "2"),
        *("--kernel", "padded_config", "--add-adapters", "2x64", "--policy", "optimal,least-loaded"),
    )
    assert ran.exit_code == 0
    tree = ran.json()
    assert [(one["policy"], one["what_if"]) for one in tree["answers"]] == [
        ("optimal", False),
        ("least-loaded", False),
        ("optimal", True),
        ("least-loaded", True),
    ]
    for answer in tree["answers"]:
        assert len(answer["max_lora_ranks"]) == answer["replicas"]
        assert answer["per_hour"] == 5.0 * answer["replicas"]
        assert answer["held_seeds"] == answer["seeds"] == 2
        assert {one["kind"] for one in answer["curve"]} == {"ttft", "tbt"}
        assert answer["worst"]["ttft_p95"] < 400
    assert tree["best"] in tree["answers"]
    for one in tree["candidates"]:
        assert [run["seed"] for run in one["by_seed"]] == [0, 1]
    written = json.loads((out / "capacity.json").read_text())
    assert {**written, "page": str(out / "index.html")} == tree
    page = Page()
    page.feed((out / "index.html").read_text())
    plots = sorted(path.name for path in out.glob("*.png"))
    bounds = ("attainment", "tbt_p95", "ttft_p95")
    assert plots == [*(f"by_replicas_{name}.png" for name in bounds), "cost_tbt.png", "cost_ttft.png"]
    assert len(page.sources) == 2 * len(plots)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert {"Answers", "Looser and tighter", "What was tried"} <= set(page.headings)


async def test_exit_code_1_if_not_even_the_most_hold() -> None:
    ran = await run_cli(*QUICK, "--slo", "ttft_p95<40ms", "--most", "2")
    assert ran.exit_code == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("error: optimal: ")
    assert "2 replicas do not hold ttft_p95<40ms; the best was " in last
    ran = await run_cli(*QUICK, "--slo", "tbt_p95<10ms", "--json")
    assert (ran.exit_code, ran.json()["best"]["replicas"]) == (1, None)
    assert ran.stderr == "error: optimal: no number of replicas holds tbt_p95<10ms: one step takes 31.8 ms\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nofile",), "nofile: "),
        (("demo", "--slo", "ttft<2s"), "--slo: 'ttft' is no figure; expected of ttft|tbt"),
        (("demo", "--policy", "nope"), "--policy: 'nope'; expected of optimal, "),
        (("demo", "--seeds", "a"), "--seeds: 'a'; expected up to 100 whole numbers"),
        (("demo", "--most", "0"), "--most: 0; expected from 1 to 1024"),
        (("demo", "--price", "-1"), "--price: -1; expected a price per GPU hour above 0"),
        (("demo", "--gpus-per-replica", "0"), "--gpus-per-replica: 0; expected from 1"),
        (("demo", "--max-lora-ranks", "x"), "--max-lora-ranks: 'x'; expected auto"),
        (("demo", "--kernel", "nope"), "--kernel: nope; expected one of padded_config"),
        (("demo", "--profile", "nope"), "--profile nope: no such profile"),
        (("demo", "--lose", "none"), "--lose: 'none'; expected such as 1"),
        (("demo", "--warmup", "-1"), "--warmup: -1.0; expected seconds"),
        (("demo", "--out", __file__), "is a file; expected a folder"),
    ],
)
async def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str) -> None:
    ran = await run_cli("capacity", *arguments)
    assert (ran.exit_code, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("error: ")
    assert line in ran.stderr


async def test_an_interrupted_search_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Far more than can be simulated before the signal, which comes once it has been told of progress.
    size = ("--requests", "150000", "--rate", "20", "--jobs", "2", "--seeds", "0,1")
    process = await start_cli("capacity", "demo", *size, "--out", str(out))
    assert process.stderr is not None
    assert b"capacity: " in await process.stderr.readline()
    children = children_of(process.pid)
    assert len(children) >= 2
    process.send_signal(signal.SIGINT)
    ran = await finish_cli(process)
    assert (ran.exit_code, ran.stdout, ran.stderr.splitlines()[-1]) == (130, "", "error: interrupted")
    assert names_in(tmp_path) == []
    # Multiprocessing's own process ends by itself when it hears of no one any more.
    for _ in range(500):
        if not any(is_running(child) for child in children):
            break
        await asyncio.sleep(0.01)
    assert [child for child in children if is_running(child)] == []


def test_shared_options_are_those_of_simulate() -> None:
    ours, theirs = inspect.signature(capacity).parameters, inspect.signature(simulate).parameters
    for name in SHARED:
        assert (ours[name].annotation, ours[name].default) == (theirs[name].annotation, theirs[name].default)
    fields = set(SimulatedWorkload.__dataclass_fields__)
    named = {f"{name}{unit}" for name in theirs for unit in ("", "_s", "_per_s")}
    assert set(WORKLOAD.values()) == fields & named - {"source"}
    assert set(CLUSTER.values()) <= set(ClusterOptions.__dataclass_fields__)


def test_options_are_taken_over_after_a_functions_own() -> None:
    def source(first: int, second: str = "x") -> None: ...

    @taking_options(source, ["second"])
    def taking(own: int, **options: object) -> None: ...

    parameters = inspect.signature(taking).parameters
    assert list(parameters) == ["own", "second"]
    assert (parameters["second"].default, parameters["second"].annotation) == ("x", str)
