"""Several simulations at once, each in a process of its own.

Owns the processes: none outlives the sweep, whether it ends, fails or is interrupted. A result travels as
its figures, and as files where a folder for it was given.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from loraserve.errors import BadInputError, LoraServeError, WorkFailedError
from loraserve.simulator.figures import Judging, RunFigures, figures_of
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.scenario import Scenario

END_TIMEOUT_S = 5.0
"""How long a process is waited for before it is killed."""

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
    bound = min(jobs or usable_cores(), len(runs))
    if bound <= 1:
        return tuple(
            run_one(run, judging, _of_run(on_progress, place), simulate) for place, run in enumerate(runs)
        )
    return _Sweep(runs, judging, on_progress, simulate).all(bound)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


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


def _of_run(on_progress: OnProgress | None, place: int) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, total: on_progress(place, done, total)


@dataclass(slots=True, kw_only=True, eq=False)
class _Child:
    place: int
    process: SpawnProcess


class _Sweep:
    """The processes of one sweep."""

    def __init__(
        self,
        runs: Sequence[SweepRun],
        judging: Judging,
        on_progress: OnProgress | None,
        simulate: Simulate | None,
    ) -> None:
        self._runs, self._judging = runs, judging
        self._on_progress, self._simulate = on_progress, simulate
        self._children: dict[Connection, _Child] = {}
        self._figures: dict[int, RunFigures] = {}

    def all(self, bound: int) -> tuple[RunFigures, ...]:
        """Run everything, `bound` processes at a time."""
        waiting = deque(range(len(self._runs)))
        try:
            while waiting or self._children:
                while waiting and len(self._children) < bound:
                    self._start(waiting.popleft())
                for connection in wait(list(self._children)):
                    self._hear(connection)  # type: ignore[arg-type]
        finally:
            self._end()
        return tuple(self._figures[place] for place in range(len(self._runs)))

    def _start(self, place: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, self._runs[place], self._judging, self._simulate)
        process = context.Process(target=_child, args=arguments, daemon=True)
        try:
            with _interrupts_held():
                process.start()
        finally:
            # With our copy open, the end of the process would not end the pipe.
            theirs.close()
        self._children[ours] = _Child(place=place, process=process)

    def _hear(self, connection: Connection) -> None:
        child = self._children[connection]
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            child.process.join(END_TIMEOUT_S)
            label = self._runs[child.place].label
            raise WorkFailedError(f"{label}: its process died ({_exit_of(child.process)})") from None
        if kind == "progress":
            if self._on_progress is not None:
                self._on_progress(child.place, *value)
        elif kind == "figures":
            self._figures[child.place] = value
            self._forget(connection)
        else:
            raise value

    def _forget(self, connection: Connection) -> None:
        child = self._children.pop(connection)
        connection.close()
        child.process.join(END_TIMEOUT_S)
        _kill(child.process)

    def _end(self) -> None:
        for child in self._children.values():
            child.process.terminate()
        for connection in list(self._children):
            self._forget(connection)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back, and let processes that start meanwhile be born with SIGINT blocked.

    A process that is interrupted before it runs our code, or handed half of its work, would tell of it.
    """
    # It unblocks SIGINT when it starts.
    resource_tracker.ensure_running()
    held: list[int] = []
    # Other threads of this process, such as those of numpy, take signals too: a mask is not enough.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, lambda came, _frame: held.append(came)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for came in held:
            signal.raise_signal(came)


def _exit_of(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is None:
        return "still ending"
    return f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill(process: SpawnProcess) -> None:
    if process.is_alive():
        process.kill()
        process.join()


def _child(connection: Connection, run: SweepRun, judging: Judging, simulate: Simulate | None) -> None:
    """The life of one process: simulate, tell, end."""
    # Ctrl-C reaches the whole group of processes; the parent ends this one in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answer: tuple[str, Any] = (
            "figures",
            run_one(run, judging, lambda done, total: connection.send(("progress", (done, total))), simulate),
        )
    except LoraServeError as error:
        answer = ("error", _labelled(run.label, error))
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        answer = ("error", WorkFailedError(f"{run.label}: {line}"))
    connection.send(answer)


def _labelled(label: str, error: LoraServeError) -> LoraServeError:
    kind = BadInputError if isinstance(error, BadInputError) else WorkFailedError
    return kind(f"{label}: {error}")
