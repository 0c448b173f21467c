"""The tables of an experiment for a terminal, and as Markdown."""

import textwrap
from typing import TYPE_CHECKING

from loraserve.experiments.report.aggregate import aggregate
from loraserve.experiments.report.claims import claims_found
from loraserve.experiments.report.grids import AT_RATES, Grid, Row, claims_grid, grids
from loraserve.experiments.results import ExperimentResult

if TYPE_CHECKING:
    from rich.table import Table

_NAME_LETTERS, _TEXT_LETTERS = 40, 28
_IN_TERMINAL = frozenset(("highest", "fewest", "ttft", "resident"))


def tables(result: ExperimentResult) -> "list[Table]":
    """What a terminal shows of an experiment, each with a title; medians only."""
    return [_table(grid) for grid in _shown(result)]


def markdown(result: ExperimentResult) -> str:
    """The same as Markdown."""
    return "\n".join(_markdown(grid) for grid in _shown(result))


def _shown(result: ExperimentResult) -> list[Grid]:
    data = aggregate(result)
    shown = [grid for grid in grids(data) if grid.anchor in _IN_TERMINAL or grid.anchor.startswith(AT_RATES)]
    found = claims_found(data)
    return [*shown, claims_grid(data, found)] if found else shown


def _table(grid: Grid) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=grid.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(grid.corner)
    for column in grid.columns:
        # Names of policies are long, their figures short.
        heading = column if grid.is_text else column.replace("/", "/\n").replace("-", "-\n")
        table.add_column(heading, justify="left" if grid.is_text else "right")
    group = ""
    for row in grid.rows:
        if row.group != group:
            group = row.group
            table.add_row(Text(group, style="italic"))
        styled = (Text(_lines(cell.text, grid), style="bold" if cell.is_best else "") for cell in row.cells)
        table.add_row(Text(_lines(row.name, grid, _NAME_LETTERS)), *styled)
    return table


def _lines(text: str, grid: Grid, letters: int = _TEXT_LETTERS) -> str:
    """Broken into lines where it is to be read: a table in a terminal is cut, not wrapped."""
    return textwrap.fill(text, letters) if grid.is_text else text


def _markdown(grid: Grid) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ":--" if grid.is_text else "--:"
    lines = [
        f"### {grid.title}",
        "",
        line([grid.corner, *grid.columns]),
        line([":--", *[align] * len(grid.columns)]),
        *(
            line(
                [_full_name(row), *(f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells)]
            )
            for row in grid.rows
        ),
        "",
        grid.note,
        "",
    ]
    return "\n".join(lines)


def _full_name(row: Row) -> str:
    return ", ".join(part for part in (row.group, row.name) if part)
