"""What `loraserve replay` shows: progress on stderr, tables or JSON on stdout, files in a folder."""

import asyncio
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loraserve.cli.common import echo_json
from loraserve.errors import WorkFailedError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.table import Table

    from loraserve.replay.dispatch import Progress
    from loraserve.replay.runner import ReplayOptions, ReplayResult
    from traces.metrics import GroupSummary

REFRESH_S = 0.25
LINE_EVERY_S = 5.0
MAX_ROWS_SHOWN = 10


class ProgressDisplay:
    """A bar on a terminal, else a line every few seconds; drawn from the loop, between arrivals."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def follow(self, progress: "Progress") -> None:
        """Show these counts until the display is left."""
        show = self._bar if sys.stderr.isatty() else self._lines
        self._task = asyncio.create_task(show(progress))

    async def _bar(self, progress: "Progress") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("replay"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        # rich's own refresh thread would compete with the event loop for the interpreter.
        with Bar(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
            task_id = bar.add_task("replay", total=progress.total, state="")
            try:
                while True:
                    _draw(bar, task_id, progress)
                    await asyncio.sleep(REFRESH_S)
            finally:
                _draw(bar, task_id, progress)

    async def _lines(self, progress: "Progress") -> None:
        try:
            while True:
                print(f"replay: {_state(progress)} of {progress.total}", file=sys.stderr, flush=True)
                await asyncio.sleep(LINE_EVERY_S)
        finally:
            print(f"replay: {_state(progress)} of {progress.total}", file=sys.stderr, flush=True)


def print_tables(result: "ReplayResult", options: "ReplayOptions", files: tuple[Path, ...]) -> None:
    """The figures per rank, then everything a reader must know to trust them."""
    from rich.console import Console

    console = Console(highlight=False)
    # On a pipe rich takes 80 columns and would cut the figures.
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    console.print(_rank_table(result))
    for line in _notes(result, options):
        console.print(line, soft_wrap=True, markup=False)
    if files:
        console.print(f"report: {files[-1]}", soft_wrap=True, markup=False)


def print_json(
    result: "ReplayResult", options: "ReplayOptions", address: str, files: tuple[Path, ...]
) -> None:
    """The summary with the keys of `vllm bench serve`, and what was replayed."""
    from traces.summary_json import summary_to_json

    trace = result.trace
    echo_json(
        {
            "trace": {
                "source": trace.source,
                "format": trace.format,
                "requests": len(trace),
                "duration_s": trace.duration_s,
                "num_bad_rows": trace.num_bad_rows,
                "bad_rows": trace.bad_rows,
            },
            "address": address,
            "options": options,
            "sent": len(result.records),
            "not_sent": result.not_sent,
            "shortened": result.shortened,
            "local_refusals": result.local_refusals,
            "interrupted": result.interrupted,
            **summary_to_json(result.summary),
            "files": files,
        }
    )


def write_files(result: "ReplayResult", folder: Path) -> tuple[Path, ...]:
    """Records, plots and the HTML report."""
    from traces.report import write_report

    try:
        return write_report(
            folder,
            result.records,
            result.summary,
            title=f"Replay of {Path(result.trace.source).name}",
            command=shlex.join(["loraserve", *sys.argv[1:]]),
            environment=_environment(),
        )
    except OSError as error:
        raise WorkFailedError(f"--out: {folder}: cannot be written: {error.strerror}") from error


def _rank_table(result: "ReplayResult") -> "Table":
    from rich.table import Table

    summary = result.summary
    table = Table(title="By rank, latencies in ms", title_justify="left")
    table.add_column("rank")
    for name in ("requests", "ok", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "tokens/s", "attainment"):
        table.add_column(name, justify="right")
    for name, group in summary.per_rank.items():
        table.add_row(name, *_figures(group))
    table.add_section()
    table.add_row("all", *_figures(summary.overall))
    return table


def _figures(group: "GroupSummary") -> tuple[str, ...]:
    return (
        str(group.requests),
        str(group.completed),
        *(_number(value) for value in (group.ttft_ms.median, group.ttft_ms.p95, group.ttft_ms.p99)),
        *(_number(value) for value in (group.tpot_ms.median, group.tpot_ms.p95)),
        f"{group.output_throughput:.1f}",
        "-" if group.attainment is None else f"{group.attainment:.1%}",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "inf" if math.isinf(value) else f"{value:.1f}"


def _notes(result: "ReplayResult", options: "ReplayOptions") -> list[str]:
    return [_verdict(result), *_pacing(result), *_left_out(result, options), *_problems(result)]


def _verdict(result: "ReplayResult") -> str:
    summary, group = result.summary, result.summary.overall
    return (
        f"{group.completed} of {group.requests} requests answered in full, "
        f"{group.request_throughput:.2f} requests/s and {group.request_goodput:.2f} within the SLO "
        f"(TTFT {summary.slo.ttft_ms:g} ms, TBT {summary.slo.tbt_ms:g} ms) over {summary.duration_s:.1f} s; "
        f"{summary.warmup_requests} warm-up requests left out"
    )


def _pacing(result: "ReplayResult") -> list[str]:
    pacing, notes = result.summary.pacing, []
    if pacing is not None and pacing.requests:
        p50, p99, largest = (_number(value) for value in (pacing.p50_ms, pacing.p99_ms, pacing.max_ms))
        notes.append(f"pacing error: p50 {p50} ms, p99 {p99} ms, max {largest} ms")
    if result.summary.void:
        notes.append(f"VOID: {result.summary.void_reason}")
    return notes


def _left_out(result: "ReplayResult", options: "ReplayOptions") -> list[str]:
    trace, notes = result.trace, []
    if trace.num_bad_rows:
        shown = "; ".join(f"line {row.line}: {row.reason}" for row in trace.bad_rows[:MAX_ROWS_SHOWN])
        more = trace.num_bad_rows - min(len(trace.bad_rows), MAX_ROWS_SHOWN)
        notes.append(f"{trace.num_bad_rows} bad rows skipped: {shown}{f'; and {more} more' if more else ''}")
    if result.shortened:
        notes.append(f"{result.shortened} requests were cut to the length limits")
    if result.local_refusals:
        notes.append(
            f"{result.local_refusals} requests were not sent: {options.max_in_flight} were in flight already "
            "(--max-in-flight); they count as refused"
        )
    if result.interrupted:
        notes.append(f"stopped early: {result.not_sent} requests were never sent")
    return notes


def _problems(result: "ReplayResult") -> list[str]:
    """What went wrong, most frequent first; lines that differ in nothing but numbers are one."""
    kinds: dict[tuple[str, str], Counter[str]] = {}
    for record in result.records:
        if record.status:
            kind = (record.outcome.value, re.sub(r"\d+", "N", record.status))
            kinds.setdefault(kind, Counter())[record.status] += 1
    lines = []
    for (outcome, _), texts in sorted(kinds.items(), key=lambda item: -item[1].total())[:MAX_ROWS_SHOWN]:
        text = next(iter(texts))
        alike = "for example " if len(texts) > 1 else ""
        lines.append(f"{texts.total()} {outcome}: {alike}{text}{_remedy(text)}")
    return lines


def _remedy(status: str) -> str:
    return " (--max-prompt-tokens cuts prompts)" if "leave no room for output" in status else ""


def _environment() -> dict[str, str]:
    import os
    import platform
    from importlib import metadata

    return {
        "LoRAServe": metadata.version("loraserve"),
        "grpcio": metadata.version("grpcio"),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
    }


def _draw(bar: "Bar", task_id: Any, progress: "Progress") -> None:
    bar.update(task_id, completed=progress.ended, state=_state(progress))
    bar.refresh()


def _state(progress: "Progress") -> str:
    in_flight = progress.sent - progress.ended
    failed = progress.ended - progress.ok
    return f"{progress.sent} sent, {in_flight} in flight, {progress.ok} ok, {failed} not ok"
