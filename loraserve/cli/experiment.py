"""`loraserve simulate EXPERIMENT`: everything that a file asks for, and a report."""

import json
import shlex
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from loraserve.experiments.results import ExperimentResult

OUT = Path("out/experiments")
ALLOWED = frozenset({"trace", "out", "jobs", "json_output", "traces"})
"""The options of `simulate` that go with an experiment; all else it says itself."""
REFRESH_S, LINE_EVERY_S = 0.2, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentOptions:
    """`source` is a file or `experiment:NAME`; `out` None is a folder of that name under out/experiments,
    `traces` None the folder that the file is in, `jobs` None one process per core."""

    source: str
    out: Path | None
    traces: Path | None
    jobs: int | None
    json_output: bool


def is_named(source: str) -> bool:
    """Whether what a user named is an experiment and no trace; without reading anything."""
    return source.startswith("experiment:") or source.endswith(".toml")


def refuse_options(source: str, given: Collection[str]) -> None:
    """BadInputError if options were given that an experiment says itself."""
    wrong = sorted(set(given) - ALLOWED)
    if wrong:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise BadInputError(
            f"{names}: {source} is an experiment and says that itself; allowed are --out, --jobs, --traces"
            " and --json"
        )


def simulate_experiment(options: ExperimentOptions) -> None:
    """Run what is left of it, write `results.json`, the report and its pictures, and show the tables."""
    from loraserve.experiments.jobs import jobs_of_experiment
    from loraserve.experiments.report.write import write_report
    from loraserve.experiments.run import run_experiment, write_results
    from loraserve.experiments.spec import find_experiment, read_experiment

    name, path = find_experiment(options.source)
    experiment = read_experiment(path)
    jobs = jobs_of_experiment(experiment, options.traces or path.parent)
    folder = options.out or OUT / name
    _refuse_file(folder)
    begun_s = time.monotonic()
    with JobProgress() as progress:
        result = run_experiment(
            name, experiment, jobs, folder, processes=options.jobs, progress=progress.told
        )
        simulated_s = time.monotonic() - begun_s
        progress.say("drawing the report")
        write_results(result, folder)
        page = write_report(result, folder, command=command_of(options))
    if options.json_output:
        print_json(result, folder, page, simulated_s, time.monotonic() - begun_s)
    else:
        print_tables(result, page)


def _refuse_file(folder: Path) -> None:
    """BadInputError if something on the way to this folder is there and no folder."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise BadInputError(f"--out: {place}: is a file; expected a folder")


def command_of(options: ExperimentOptions) -> str:
    """The command that makes it again."""
    traces = [] if options.traces is None else ["--traces", str(options.traces)]
    return shlex.join(["loraserve", "simulate", options.source, *traces])


def print_tables(result: "ExperimentResult", page: Path) -> None:
    """What the report's tables have."""
    from loraserve.cli.tables import show
    from loraserve.experiments.report.tables import tables

    for table in tables(result):
        show(table)
        print()
    print(f"report: {page}")


def print_json(
    result: "ExperimentResult", folder: Path, page: Path, simulated_s: float, wall_s: float
) -> None:
    """One JSON object: where everything is, what it took, and what every job found."""
    from loraserve.experiments.results import tree_of

    tree: dict[str, Any] = {
        "experiment": result.name,
        "out": str(folder),
        "page": str(page),
        "simulated_s": simulated_s,
        "wall_s": wall_s,
        "jobs": [tree_of(job) for job in result.jobs],
    }
    print(json.dumps(tree, allow_nan=False, ensure_ascii=False), flush=True)


class JobProgress:
    """A bar on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        from loraserve.experiments.run import Progress

        self.told = Progress(on_step=self._step, on_done=self._done)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._begun_s = time.monotonic()
        self._next_s = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("experiment"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, what: str) -> None:
        """Something else that goes on."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)
        else:
            print(f"experiment: {what}", file=sys.stderr, flush=True)

    def _step(self, label: str, what: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{label}: {what}")

    def _done(self, done: int, total: int, before: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now_s = time.monotonic()
        if done == total or now_s >= self._next_s:
            self._next_s = now_s + LINE_EVERY_S
            kept = f", {before:,} from an earlier run" if before else ""
            left = ""
            if before < done < total:
                left = f", about {(now_s - self._begun_s) / (done - before) * (total - done):.0f} s left"
            print(f"experiment: {done:,} of {total:,} jobs{kept}{left}", file=sys.stderr, flush=True)
