"""Several simulations at once, in processes of their own.

A result travels as its figures, and as files where a folder for it was given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraserve.errors import WorkFailedError
from loraserve.simulator.crew import Tell, Work, work_through
from loraserve.simulator.figures import Judging, RunFigures, figures_of
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.scenario import Scenario

Simulate = Callable[..., SimulationResult]
OnProgress = Callable[[int, int, int], None]
"""Told the place of a run, and how many of its requests have come, of how many."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepRun:
    """One simulation of a sweep; its result is written into `folder` if there is one."""

    scenario: Scenario
    folder: Path | None = None

    @property
    def label(self) -> str:
        """What a person calls it."""
        return label_of(self.scenario)


def label_of(scenario: Scenario) -> str:
    """The name of a scenario among others of its sweep."""
    return f"policy {scenario.policy}, routing {scenario.routing}, seed {scenario.seed}"


def sweep(
    runs: Sequence[SweepRun],
    judging: Judging,
    *,
    jobs: int | None = None,
    on_progress: OnProgress | None = None,
    simulate: Simulate | None = None,
) -> tuple[RunFigures, ...]:
    """Run them all, at most `jobs` at a time (None: one per core), and give their figures in the same order.

    The figures do not depend on `jobs`. One job, or one run, is simulated in this process. `simulate` is
    another simulator, a function of a module. The first failure ends all others and is raised; a process
    that dies is a WorkFailedError with its exit code.
    """
    work = Work(act=partial(_act, judging, simulate), label=_label, on_progress=_telling(on_progress))
    return work_through(runs, work, jobs=jobs)


def run_one(
    run: SweepRun,
    judging: Judging,
    on_progress: Callable[[int, int], None] | None = None,
    simulate: Simulate | None = None,
) -> RunFigures:
    """Simulate, judge, and write the files; WorkFailedError if the disk refuses."""
    result = (simulate or _simulator())(run.scenario, on_progress=on_progress)
    figures = figures_of(result, judging)
    if run.folder is not None:
        from loraserve.simulator.result_files import write_result

        try:
            write_result(result, run.folder, summary=figures.summary)
        except OSError as error:
            raise WorkFailedError(f"{run.folder}: cannot be written: {error.strerror or error}") from error
    return figures


def _simulator() -> Simulate:
    from loraserve.simulator.run import simulate

    return simulate


def _act(judging: Judging, simulate: Simulate | None, run: SweepRun, tell: Tell) -> RunFigures:
    return run_one(run, judging, lambda done, total: tell((done, total)), simulate)


def _label(run: SweepRun) -> str:
    return run.label


def _telling(on_progress: OnProgress | None) -> Callable[[int, tuple[int, int]], None] | None:
    return None if on_progress is None else lambda place, told: on_progress(place, *told)
