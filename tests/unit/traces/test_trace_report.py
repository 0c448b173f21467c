"""A report is complete, self-contained, and carries nothing from outside unescaped."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from traces import Outcome, RequestRecord, bundled_trace, read_records, schedule, summarise
from traces.plots import DARK, LIGHT, plots_of
from traces.report import write_report
from traces.report_page import MAX_ADAPTER_ROWS, number

PNG = b"\x89PNG\r\n\x1a\n"
NASTY = "<script>alert('x')</script> & \"quotes\""


def records(late_s: float = 0.0, adapter: str | None = None) -> list[RequestRecord]:
    """The bundled trace as a made-up cluster would have answered it."""
    made = []
    for due_s, request in schedule(bundled_trace("demo")):
        rank = request.rank or 0
        failed = request.index % 20 == 19
        count = 0 if failed else request.output_tokens
        times_s = tuple(due_s + 0.05 + 0.002 * rank + 0.03 * place for place in range(count))
        made.append(
            RequestRecord(
                index=request.index,
                request_id=f"demo-{request.index}",
                adapter=adapter or request.adapter,
                rank=request.rank,
                scheduled_s=due_s,
                sent_s=due_s + late_s,
                end_s=times_s[-1] if times_s else due_s + 0.01,
                prompt_tokens=request.prompt_tokens,
                output_tokens=count,
                expected_output_tokens=request.output_tokens,
                outcome=Outcome.REFUSED if failed else Outcome.OK,
                status=NASTY if failed else "",
                message_times_s=times_s,
                message_tokens=(1,) * count,
                warmup=due_s < 5,
            )
        )
    return made


class Page(HTMLParser):
    """Tags balance, and what they refer to is kept."""

    VOID = frozenset(("meta", "img", "source", "link", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report(folder: Path, made: list[RequestRecord], **texts: str) -> tuple[Page, str]:
    paths = write_report(
        folder,
        made,
        summarise(made),
        title=texts.get("title", "A run"),
        command=texts.get("command", "loraserve replay"),
        environment={"Engine": "emulated", NASTY: NASTY},
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def test_a_report_writes_records_summary_plots_and_a_page(tmp_path: Path) -> None:
    made = records()
    page, _ = report(tmp_path / "new" / "out", made)
    folder = tmp_path / "new" / "out"
    assert read_records(folder / "records.jsonl") == tuple(made)
    tree = json.loads((folder / "summary.json").read_text())
    assert (tree["title"], tree["overall"]["requests"]) == ("A run", summarise(made).overall.requests)
    assert set(tree["per_rank"]) == {"base", "8", "16", "32", "64", "128"}
    plots = sorted(path.name for path in folder.glob("*.png"))
    assert plots == ["attainment.png", "over_time.png", "tbt_cdf.png", "ttft_cdf.png"]
    assert all((folder / name).read_bytes().startswith(PNG) for name in plots)
    said = " ".join(page.text)
    for words in (
        "Base model",
        "Rank 128",
        "rank-64",
        "By adapter",
        "What failed",
        "Pacing error",
        "goodput",
    ):
        assert words in said


def test_a_page_needs_nothing_but_itself_and_runs_nothing(tmp_path: Path) -> None:
    page, text = report(tmp_path, records())
    assert page.open == []
    assert len(page.links) == 8
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & page.tags
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 36rem"):
        assert rule in text


def test_text_from_outside_is_escaped_everywhere(tmp_path: Path) -> None:
    page, text = report(tmp_path, records(adapter=NASTY), title=NASTY, command=NASTY)
    assert "<script" not in text
    assert page.open == []
    # Title (twice), command, environment (name and value), adapter, status.
    assert " ".join(page.text).count(NASTY) == 7


def test_a_void_run_says_so_first(tmp_path: Path) -> None:
    page, _ = report(tmp_path, records(late_s=0.05))
    said = " ".join(page.text)
    assert said.index("This run is void") < said.index("By rank")
    assert json.loads((tmp_path / "summary.json").read_text())["void"] is True


@pytest.mark.parametrize("kept", [0, 1])
def test_a_run_of_nothing_or_of_one_failure_still_gets_its_page(tmp_path: Path, kept: int) -> None:
    page, _ = report(
        tmp_path, [one for one in records() if one.outcome is Outcome.REFUSED and not one.warmup][:kept]
    )
    assert ("No requests after the warm-up." in " ".join(page.text)) == (kept == 0)


def test_many_adapters_are_cut_with_a_note(tmp_path: Path) -> None:
    made = [one for one in records() if not one.warmup]
    many = [
        RequestRecord(
            index=index,
            request_id=str(index),
            adapter=f"adapter-{index:04}",
            rank=8,
            scheduled_s=0.0,
            sent_s=0.0,
            end_s=1.0,
            prompt_tokens=1,
            output_tokens=1,
            expected_output_tokens=1,
            outcome=Outcome.OK,
            message_times_s=(1.0,),
            message_tokens=(1,),
        )
        for index in range(MAX_ADAPTER_ROWS + 7)
    ]
    page, _ = report(tmp_path, [*made, *many])
    assert "12 more adapters are in summary.json." in " ".join(page.text)


def test_the_same_run_gives_the_same_plots() -> None:
    made = records()
    for plot in plots_of(made, summarise(made).slo):
        light = plot.draw(LIGHT)
        assert light == plot.draw(LIGHT)
        assert light != plot.draw(DARK)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("inf"), "∞"),
        (0.0, "0.00"),
        (0.123, "0.12"),
        (1.25, "1.2"),
        (99.94, "99.9"),
        (12345.6, "12,346"),
    ],
)
def test_figures_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_importing_traces_costs_no_heavy_import() -> None:
    heavy = "matplotlib scipy pyarrow msgspec html asyncio"
    script = f"import sys, traces; sys.exit(' '.join(set('{heavy}'.split()) & set(sys.modules)) or None)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
