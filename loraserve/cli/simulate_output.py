"""What `loraserve simulate` shows: progress on stderr, tables or JSON on stdout, files in a folder."""

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loraserve.cli.common import echo_json
from loraserve.cli.tables import show
from loraserve.simulator.report import PAGE, run_to_json
from traces.plots import rank_label

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.table import Table

    from loraserve.cli.simulate_runs import Plan, SimulateOptions
    from loraserve.simulator.figures import RunFigures
    from traces.metrics import GroupSummary

__all__ = ["PAGE", "SweepProgress", "print_json", "print_tables", "write_files"]

REFRESH_S = 0.2
FIRST_LINE_S, LINE_EVERY_S = 1.0, 5.0


class SweepProgress:
    """A bar on a terminal, else a line every few seconds; call it with a run's place and its counts."""

    def __init__(self, totals: Sequence[int]) -> None:
        self._done = [0] * len(totals)
        self._totals = totals
        self._bar: Bar | None = None
        self._next_s = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("simulate"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
            self._bar.add_task("simulate", total=sum(self._totals))
            self._bar.start()
        self._next_s = time.monotonic() + (REFRESH_S if self._bar is not None else FIRST_LINE_S)
        return self

    def __call__(self, place: int, done: int, total: int) -> None:
        """The run at this place has seen so many requests."""
        self._done[place] = done
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + (REFRESH_S if self._bar is not None else LINE_EVERY_S)
            self._show()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()

    def _show(self) -> None:
        done, total = sum(self._done), sum(self._totals)
        if self._bar is None:
            print(f"simulate: {done:,} of {total:,} requests", file=sys.stderr, flush=True)
            return
        self._bar.update(self._bar.task_ids[0], completed=done)
        self._bar.refresh()


def print_tables(
    plan: "Plan",
    options: "SimulateOptions",
    runs: Mapping[str, "RunFigures"],
    page: Path | None,
    *,
    per_rank: bool,
) -> None:
    """The policies side by side, and per rank where that is asked for."""
    print(_headline(plan, runs))
    for line in options.what_if.describe():
        print(f"what if: {line}")
    show(_policy_table(runs))
    if per_rank:
        print("\nBy rank, latencies in ms")
        show(_rank_table(runs))
    for line in _failures(runs):
        print(line)
    if page is not None:
        print(f"report: {page}")


def warn(options: "SimulateOptions", runs: Mapping[str, "RunFigures"]) -> None:
    """On stderr, which failures never came because everything had ended before them."""
    last_s = max(float(run.pictures.edges_s[-1]) for run in runs.values())
    for failure in options.cluster.failures:
        if failure.at_s >= last_s:
            named = f"{failure.replica_id}@{failure.at_s:g}s"
            print(f"warning: --fail: {named} never happens, all is over at {last_s:.1f} s", file=sys.stderr)


def print_json(
    plan: "Plan", options: "SimulateOptions", runs: Mapping[str, "RunFigures"], page: Path | None
) -> None:
    """All runs with the keys of `vllm bench serve`, and what was simulated."""
    echo_json(
        {
            "options": options,
            "what_if": options.what_if.describe(),
            "runs": [
                {
                    "label": label,
                    **run_to_json(run),
                    "wall_s": run.wall_s,
                    "judging_s": run.judging_s,
                    "simulated_requests_per_s": run.simulated_requests_per_s,
                }
                for label, run in runs.items()
            ],
            "page": page,
        }
    )


def write_files(
    plan: "Plan", options: "SimulateOptions", runs: Mapping[str, "RunFigures"], folder: Path
) -> None:
    """Plots and the page that compares, beside what the runs have written."""
    from loraserve.simulator.report import write_comparison

    scenario = next(iter(plan.scenarios.values()))
    asked = {"what if": "; ".join(options.what_if.describe())} if options.what_if else {}
    write_comparison(
        folder,
        runs,
        plan.folders,
        title=f"Simulation of {Path(scenario.trace.source).name}",
        command=shlex.join(["loraserve", *sys.argv[1:]]),
        workload={name.replace("_", " "): str(value) for name, value in scenario.describe().items()} | asked,
    )


def _headline(plan: "Plan", runs: Mapping[str, "RunFigures"]) -> str:
    scenario, run = next(iter(plan.scenarios.values())), next(iter(runs.values()))
    trace, slo = scenario.trace, run.summary.slo
    warmup = run.summary.warmup_requests
    left_out = f", {warmup:,} of warm-up left out" if warmup else ""
    bad = f", {trace.num_bad_rows:,} bad rows skipped" if trace.num_bad_rows else ""
    return (
        f"{trace.source}: {len(trace):,} requests in {trace.duration_s:,.0f} s, {len(trace.adapters):,}"
        f" adapters, {len(scenario.replicas):,} replicas; TTFT within {slo.ttft_ms:g} ms, TBT within"
        f" {slo.tbt_ms:g} ms{left_out}{bad}"
    )


_ROWS: tuple[tuple[str, Any], ...] = (
    ("requests/s", lambda run: _number(run.summary.overall.request_throughput)),
    ("goodput, requests/s", lambda run: _number(run.summary.overall.request_goodput)),
    ("attainment", lambda run: _share(run.summary.overall.attainment)),
    ("TTFT p50, ms", lambda run: _number(run.summary.overall.ttft_ms.median)),
    ("TTFT p95, ms", lambda run: _number(run.summary.overall.ttft_ms.p95)),
    ("TTFT p99, ms", lambda run: _number(run.summary.overall.ttft_ms.p99)),
    ("TBT p50, ms", lambda run: _number(run.summary.overall.itl_ms.median)),
    ("TBT p95, ms", lambda run: _number(run.summary.overall.itl_ms.p95)),
    ("output tokens/s", lambda run: _number(run.summary.overall.output_throughput)),
    ("failed", lambda run: f"{run.summary.overall.requests - run.summary.overall.completed:,}"),
    ("utilisation", lambda run: _share(run.utilisation)),
    ("copies", lambda run: f"{run.copies:,}"),
    ("moved, MiB", lambda run: _number(run.bytes_moved / 2**20)),
    ("cold misses", lambda run: f"{run.cold_misses:,}"),
    ("simulated requests/s", lambda run: f"{run.simulated_requests_per_s:,.0f}"),
)
_MAX_SIDE_BY_SIDE = 5


def _policy_table(runs: Mapping[str, "RunFigures"]) -> "Table":
    """A column per run, or a row per run where they would be too many."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    if len(runs) <= _MAX_SIDE_BY_SIDE:
        table.add_column("")
        for label in runs:
            table.add_column(label, justify="right")
        for name, value in _ROWS:
            table.add_row(name, *(value(run) for run in runs.values()))
        return table
    table.add_column("policy")
    shown = [row for row in _ROWS if row[0] not in ("output tokens/s", "TTFT p99, ms")]
    for name, _ in shown:
        table.add_column(
            name.replace(", requests/s", "").replace(", ms", "").replace("simulated ", "sim. "),
            justify="right",
        )
    for label, run in runs.items():
        table.add_row(label, *(value(run) for _, value in shown))
    return table


def _rank_table(runs: Mapping[str, "RunFigures"]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("rank", "policy"):
        table.add_column(name)
    for name in ("requests", "failed", "attainment", "TTFT p50", "p95", "p99", "TBT p50", "p95", "tokens/s"):
        table.add_column(name, justify="right")
    for rank in dict.fromkeys(name for run in runs.values() for name in run.summary.per_rank):
        for label, run in runs.items():
            if rank in run.summary.per_rank:
                table.add_row(rank_label(rank), label, *_rank_figures(run.summary.per_rank[rank]))
    return table


def _rank_figures(group: "GroupSummary") -> list[str]:
    ttft, tbt = group.ttft_ms, group.itl_ms
    latencies = (ttft.median, ttft.p95, ttft.p99, tbt.median, tbt.p95)
    return [
        f"{group.requests:,}",
        f"{group.requests - group.completed:,}",
        _share(group.attainment),
        *(_number(value) for value in latencies),
        _number(group.output_throughput),
    ]


def _failures(runs: Mapping[str, "RunFigures"]) -> list[str]:
    lines = []
    for label, run in runs.items():
        outcomes = run.summary.overall.outcomes
        bad = ", ".join(
            f"{count:,} {outcome.value}" for outcome, count in outcomes.items() if outcome != "ok"
        )
        if bad:
            why = f"; such as {run.first_failure}" if run.first_failure else ""
            lines.append(f"{label}: {bad}{why}")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isinf(value):
        return "inf"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"
