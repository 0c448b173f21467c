"""Several simulations at once as tasks of a Ray cluster: `loraserve.simulator.sweep` beyond one machine.

The scenarios go there once, in one object that all tasks read; figures and files come back as bytes.
"""

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraserve.cluster import ray_session
from loraserve.errors import LoraServeError, WorkFailedError
from loraserve.simulator.figures import Judging, RunFigures
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.sweep import SweepRun, run_one

POLL_S = 0.5
MAX_RETRIES = 2
"""How often a task whose worker died is tried again; a simulation has no effect but its result."""


def ray_sweep(
    runs: Sequence[SweepRun],
    judging: Judging,
    address: str,
    *,
    on_done: Callable[[int], None] | None = None,
) -> tuple[RunFigures, ...]:
    """Run them all as tasks of one core each, and give their figures in the same order.

    `address` is HOST:PORT, or auto; LoRAServe of this version must be installed on the cluster's machines.
    `on_done` is told the place of each run that has ended. Files come back into the runs' folders here.
    UnavailableError or BadInputError if the cluster does not take this process; the first failure ends all
    other tasks and is raised.
    """
    address = ray_session.find_address(address, option="--ray")
    ray_session.check_reachable(address, os.environ)
    os.environ.update(ray_session.token_environment(os.environ))
    ray_session.join(address, {})
    import ray

    try:
        return _run(runs, judging, on_done)
    finally:
        ray.shutdown()


def _run(
    runs: Sequence[SweepRun], judging: Judging, on_done: Callable[[int], None] | None
) -> tuple[RunFigures, ...]:
    import ray

    # One pickle, in which the trace that the scenarios share is there once.
    shared = ray.put(pickle.dumps([run.scenario for run in runs]))
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(run_there)
    places = {
        task.remote(shared, place, judging, run.folder is not None): place for place, run in enumerate(runs)
    }
    figures: dict[int, RunFigures] = {}
    left = list(places)
    try:
        while left:
            done, left = ray.wait(left, timeout=POLL_S)
            for reference in done:
                place = places[reference]
                figures[place] = _receive(runs[place], _get(reference, runs[place].label))
                if on_done is not None:
                    on_done(place)
    finally:
        for reference in left:
            ray.cancel(reference, force=True)
    return tuple(figures[place] for place in range(len(runs)))


def _get(reference: Any, label: str) -> bytes:
    import ray

    try:
        answer: bytes = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        line = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise WorkFailedError(f"{label}: {line}") from None
    except ray.exceptions.RayError as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkFailedError(f"{label}: its task died: {line}") from None
    return answer


def _receive(run: SweepRun, answer: bytes) -> RunFigures:
    """The figures of an answer, whose files are written, or its error, which is raised."""
    figures, files = pickle.loads(answer)
    if isinstance(figures, LoraServeError):
        raise type(figures)(f"{run.label}: {figures}")
    if run.folder is not None:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (run.folder / name).write_bytes(data)
        except OSError as error:
            raise WorkFailedError(f"{run.folder}: cannot be written: {error.strerror or error}") from error
    result: RunFigures = figures
    return result


def run_there(shared: bytes, place: int, judging: Judging, with_files: bool) -> bytes:
    """The task: one of the pickled scenarios, its figures and files as bytes."""
    scenario: Scenario = pickle.loads(shared)[place]
    with tempfile.TemporaryDirectory(prefix="loraserve-sweep-") as folder:
        run = SweepRun(scenario=scenario, folder=Path(folder) if with_files else None)
        try:
            figures: RunFigures | LoraServeError = run_one(run, judging)
        except LoraServeError as error:
            figures = error
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return pickle.dumps((figures, files))
