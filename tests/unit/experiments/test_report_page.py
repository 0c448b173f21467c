"""The report of an experiment is whole, escaped, bounded, and the same bytes for the same result."""

import io
import re
import tomllib
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loraserve.errors import WorkFailedError
from loraserve.experiments.contenders import CONTENDERS
from loraserve.experiments.report.aggregate import aggregate
from loraserve.experiments.report.looks import looks_of
from loraserve.experiments.report.plots import MAX_PLOTS, choose_plots
from loraserve.experiments.report.tables import markdown, tables
from loraserve.experiments.report.write import write_report
from loraserve.experiments.spec import parse_experiment
from tests.support.full_disk import full_disk
from tests.support.made_experiments import result_of
from traces.plots import DARK, LIGHT

NASTY = "<script>alert('x')</script> & \"quotes\" | \\ é $\\frac{$"
PNG = b"\x89PNG\r\n\x1a\n"
SMALL: dict[str, Any] = {
    "title": NASTY,
    "summary": NASTY,
    "traces": [{"name": "u", "source": "preset:loraserve-uniform", "note": NASTY}],
    "policies": ["optimal", "slora-random"],
    "replicas": [2],
    "rates": ["0.5x", 30],
    "find": {"highest_rate": True, "fewest_replicas_at": [40], "most_replicas": 9},
    "claims": [
        {
            "text": NASTY,
            "why": NASTY,
            "source": NASTY,
            "figure": "ttft_p95_ms",
            "policy": "optimal",
            "over": "slora-random",
            "paper": 2,
        }
    ],
    "published": [
        {"name": NASTY, "figure": "ttft_p95_ms", "points": [[10, 20], [20, 30]]},
        {"name": "what is this", "figure": "requests", "points": [[1, 2]]},
    ],
}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in SMALL.items() if key not in keys}


def written(tmp_path: Path, tree: dict[str, Any], held: float = 0.8) -> str:
    path = write_report(result_of(tree, lambda *_: held), tmp_path / "out", command=f"run {NASTY}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("page"), SMALL)


def test_the_same_result_gives_the_same_bytes_and_only_these(tmp_path: Path) -> None:
    result = result_of(SMALL, lambda *_: 0.8)
    for name in ("a", "b"):
        write_report(result, tmp_path / name, command="x")
    trees = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b")
    ]
    assert trees[0] == trees[1]
    assert {path.parts[0] for path in trees[0]} == {"plots", "report.html"}
    pictures = [data for path, data in trees[0].items() if path.suffix == ".png"]
    assert len(pictures) == 7
    assert all(data.startswith(PNG) and b"tIME" not in data for data in pictures)


def test_a_page_stands_by_itself_and_carries_nothing_unescaped(page: str) -> None:
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("alert(&#x27;x&#x27;)") >= 6
    links = re.findall(r'href="#([^"]*)"', page)
    assert len(links) >= 7
    assert [page.count(f'id="{link}"') for link in links] == [1] * len(links)
    assert page.count("<picture>") == 7
    assert "what is this" in page
    assert "reached" in page


def test_the_experiment_on_the_page_can_be_read_again(page: str) -> None:
    found = re.search(r"<h3>The experiment</h3>\n<pre>(.*?)</pre>", page, re.DOTALL)
    assert found is not None
    again = parse_experiment(tomllib.loads(unescape(found.group(1))))
    assert again == parse_experiment(SMALL)


@pytest.mark.parametrize(
    ("tree", "held"),
    [
        ({**without("rates"), "find": {"fewest_replicas_at": [40.0], "most_replicas": 9}}, 0.8),
        ({**without("rates"), "find": {"fewest_replicas_at": [40.0], "most_replicas": 9}}, 0.0),
        ({**without("rates"), "find": {"highest_rate": True}}, 0.0),
        (without("find", "claims", "published"), 0.0),
        (without("rates", "find"), 0.8),
        (without("rates", "find"), 0.0),
    ],
    ids=["fewest", "no fewest", "no highest", "no rate held", "own rate", "own rate lost"],
)
def test_a_report_is_written_of_whatever_was_found(tmp_path: Path, tree: dict[str, Any], held: float) -> None:
    html = written(tmp_path, tree, held)
    assert "<picture>" in html
    figures = html.partition("What the figures mean</h2>")[0]
    assert not re.search(r"\b(inf|nan|None)\b", figures)


def test_what_never_held_is_said_so(tmp_path: Path) -> None:
    text = written(tmp_path, SMALL, 0.0)
    assert "<td>never</td>" in text
    assert "<td>&gt; 9</td>" in text
    assert "<td>∞</td>" in text
    assert "no figure: neither has a finite TTFT p95" in text


def test_an_earlier_report_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "old.png").write_bytes(b"old")
    (folder / "results.json").write_bytes(b"{}")
    written(tmp_path, without("find", "claims"))
    assert not (folder / "plots" / "old.png").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["plots", "report.html", "results.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(WorkFailedError, match="out: cannot be written: "):
        written(tmp_path, without("find", "claims"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_earlier_report(tmp_path: Path) -> None:
    before = written(tmp_path, without("find", "claims"))
    with full_disk(tmp_path, room_bytes=3000), pytest.raises(WorkFailedError, match="cannot be written"):
        written(tmp_path, {**without("find", "claims"), "title": "another"})
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plots_are_bounded_and_the_page_says_what_is_left_out() -> None:
    data = aggregate(
        result_of(
            {
                **SMALL,
                "traces": [
                    {"name": f"t{place}", "source": "preset:loraserve-uniform"} for place in range(14)
                ],
                "replicas": [2, 4, 8, 12],
                "kernels": ["sum", "padded_batch", "padded_config"],
            },
            lambda *_: 0.8,
        )
    )
    chosen = choose_plots(data)
    names = [one.plot.name for one in chosen.plots]
    assert len(names) == len(set(names)) == MAX_PLOTS
    assert {"highest_rates", "ttft_p95_sum_2_replicas", "ttft_p95_padded_config_12_replicas"} <= set(names)
    assert any("attainment sum 12 replicas" in said for said in chosen.left_out)
    assert any("first 12 of 14 workloads" in said for said in chosen.left_out)
    assert all(re.fullmatch(r"[a-z0-9_.-]+", name) for name in names)


def test_policies_look_the_same_everywhere_and_differ_from_each_other() -> None:
    names = [one.name for one in CONTENDERS]
    looks = looks_of([*names, "dlora-migrating", "dlora/marginal-cost"])
    assert looks_of(list(reversed(names)))["dlora"] == looks["dlora"]
    for theme in (LIGHT, DARK):
        assert len({look.colour(theme) for look in looks.values()}) == len(looks)
        assert all(contrast(look.colour(theme), theme.background) >= 3 for look in looks.values())
    assert len({look.marker for look in looks.values()}) >= len(names)
    assert len({(look.marker, str(look.line)) for look in looks.values()}) == len(looks)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_terminal_shows_all_policies_uncut() -> None:
    names = [one.name for one in CONTENDERS]
    claim = {**SMALL["claims"][0], "text": "a long claim " * 9, "over": "everywhere-marginal"}
    shown = tables(result_of({**SMALL, "policies": names, "claims": [claim]}, lambda *_: 0.8))
    titles = [str(table.title) for table in shown]
    assert titles[0] == "Highest rate inside the SLO, requests/s"
    assert titles[-1] == "What was published, and what was found here"
    out = io.StringIO()
    console = Console(file=out, width=160)
    for table in shown:
        for column in table.columns:
            column.no_wrap = True
        console.print(table)
    assert "…" not in out.getvalue()
    assert out.getvalue().count("16.0") == len(names)


def test_markdown_keeps_its_columns() -> None:
    lines = markdown(result_of(SMALL, lambda *_: 0.8)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 10
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 8) for row in rows)
