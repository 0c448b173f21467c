"""What `loraserve capacity` shows: its search on stderr, the answer on stdout, files in a folder."""

import shlex
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from loraserve.capacity.mixes import mix_text
from loraserve.capacity.trials import label_of
from loraserve.capacity.words import (
    answer_lines,
    curve_text,
    figure_name,
    none_line,
    policy_text,
    replicas_text,
    run_text,
    seeds_text,
)
from loraserve.cli.common import echo_json
from loraserve.cli.tables import show

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table

    from loraserve.capacity.answers import Found
    from loraserve.capacity.solve import CapacityOptions, Problem
    from loraserve.capacity.study import Told
    from loraserve.capacity.trials import Trial

PAGE = "index.html"
SHOWN_LIVE = 24
REFRESH_S, FIRST_LINE_S, LINE_EVERY_S = 0.2, 1.0, 5.0


class SearchProgress:
    """A table that grows on a terminal, else a line for each trial, and now and then one for those under
    way."""

    def __init__(self, problem: "Problem") -> None:
        self._problem = problem
        self._rows: list[tuple[str, ...]] = []
        self._going: dict[Trial, float] = {}
        self._live: Live | None = None
        self._next_s = time.monotonic() + FIRST_LINE_S

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(self._table(), console=console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def ended(self, told: "Told") -> None:
        """A trial that was asked for has ended."""
        row = self._row(told)
        self._rows.append(row)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            print(f"capacity: {', '.join(part for part in row if part)}", file=sys.stderr, flush=True)
            self._next_s = time.monotonic() + LINE_EVERY_S

    def going(self, trial: "Trial", done: int, total: int) -> None:
        """So many requests of a trial have come; it may be one that nobody has asked for yet."""
        self._going[trial] = done / total
        if done >= total:
            del self._going[trial]
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + (REFRESH_S if self._live is not None else LINE_EVERY_S)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif self._going:
            print(f"capacity: {self._under_way()}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _under_way(self) -> str:
        return "; ".join(f"{label_of(trial)}: {share:.0%} simulated" for trial, share in self._going.items())

    def _row(self, told: "Told") -> tuple[str, ...]:
        trial, found = told.trial, told.figures
        has_several = len(self._problem.questions) > 1
        clauses = self._problem.options.target.clauses
        if found.gave_up_ms is not None:
            figures = f"TTFT p95 above {found.gave_up_ms:,.0f} ms, given up"
        else:
            figures = ", ".join(f"{figure_name(one)} {run_text(one, found)}" for one in clauses)
        return (
            trial.contender.name if has_several else "",
            "what if" if trial.what_if else "",
            replicas_text(trial.num_replicas),
            mix_text(trial.mix) if self._problem.has_mixes else "",
            f"seed {trial.seed}",
            figures,
            "holds" if told.held else "misses",
        )

    def _table(self) -> "Group":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for row in self._rows[-SHOWN_LIVE:]:
            table.add_row(*row)
        return Group(table, Text(f"{len(self._rows)} simulations. {self._under_way()}"))


def print_answer(found: "Found", page: Path | None) -> None:
    """The search, the targets' curve, and the answer in words."""
    if found.candidates:
        show(search_table(found))
        print()
    if any(answer.curve for answer in found.answers):
        show(curve_table(found))
        print()
    for line in answer_lines(found):
        print(line)
    if page is not None:
        print(f"report: {page}")


def say_none(found: "Found", most: int) -> None:
    """One line on stderr for each policy that found nothing: what came nearest."""
    for answer in found.answers:
        if answer.best is None:
            print(f"error: {none_line(found, answer, most)}", file=sys.stderr)


def search_table(found: "Found") -> "Table":
    """Every candidate, the figures of each of its seeds."""
    from rich.table import Table

    clauses = found.target.clauses
    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    table.add_column("replicas", justify="right")
    if found.has_mixes:
        table.add_column("max_lora_rank")
    for clause in clauses:
        table.add_column(f"{figure_name(clause)} by seed", justify="right")
    table.add_column("held", justify="right")
    for one in found.candidates:
        cells = [policy_text(one.policy, one.what_if), str(one.replicas)]
        cells += [mix_text(one.mix)] if found.has_mixes else []
        cells += [seeds_text(clause, one) for clause in clauses]
        table.add_row(*cells, f"{one.num_held} of {len(one.held)}")
    return table


def curve_table(found: "Found") -> "Table":
    """The fewest replicas at looser and tighter targets, and their price."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("target")
    for answer in found.answers:
        table.add_column(policy_text(answer.policy, answer.what_if), justify="right")
    points = [answer.curve for answer in found.answers if answer.curve]
    for place, point in enumerate(points[0]):
        cells = []
        for answer in found.answers:
            at = answer.curve[place] if answer.curve else None
            cells.append("-" if at is None else curve_text(at))
        table.add_row(point.target.text, *cells)
    return table


def print_json(found: "Found", options: "CapacityOptions", page: Path | None) -> None:
    """Everything as one object."""
    from loraserve.capacity.tree import tree_of

    echo_json({**tree_of(found), "command": command_line(), "page": page})


def command_line() -> str:
    """What was run."""
    return shlex.join(["loraserve", *sys.argv[1:]])


def write_files(found: "Found", folder: Path) -> None:
    """`capacity.json`, the plots and the page."""
    from loraserve.capacity.report import write_report

    write_report(folder, found, command=command_line())
