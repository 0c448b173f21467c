"""Runs an experiment's jobs side by side, keeps what each found, and goes on where an earlier run ended."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import WorkFailedError
from loraserve.experiments.jobs import Job, job_key
from loraserve.experiments.measure import measure
from loraserve.experiments.results import ExperimentResult, JobResult, job_from_json, to_json
from loraserve.experiments.spec import Experiment
from loraserve.simulator.crew import Tell, Work, work_through

JOBS, RESULTS = "jobs", "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What happens while jobs are done; `on_step` hears a job's label and what it has just done, `on_done`
    how many jobs are done, of how many, and how many of them an earlier run did."""

    on_step: Callable[[str, str], None]
    on_done: Callable[[int, int, int], None]


def run_experiment(
    name: str,
    experiment: Experiment,
    jobs: Sequence[Job],
    folder: Path,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> ExperimentResult:
    """What all jobs find; each result is a file in `folder`/jobs as soon as it is there, and one that is
    there from an earlier run, of the same job by the same code, is taken as it is.

    So the result is the same, byte for byte, whether or not it was interrupted. WorkFailedError if the disk
    refuses or a process dies; BadInputError of a job that does not fit together.
    """
    store = JobStore(folder / JOBS)
    keys = [job_key(job) for job in jobs]
    found = {place: kept for place, key in enumerate(keys) if (kept := store.read(key)) is not None}
    before = len(found)
    left = [place for place in range(len(jobs)) if place not in found]

    def on_done(at: int, value: JobResult) -> None:
        place = left[at]
        found[place] = value
        store.write(keys[place], value)
        if progress is not None:
            progress.on_done(len(found), len(jobs), before)

    def on_progress(at: int, told: str) -> None:
        if progress is not None:
            progress.on_step(jobs[left[at]].label, told)

    if progress is not None:
        progress.on_done(before, len(jobs), before)
    work = Work(act=_act, label=_label, on_progress=on_progress, on_done=on_done)
    work_through([jobs[place] for place in left], work, jobs=processes)
    return ExperimentResult(
        name=name, experiment=experiment, jobs=tuple(found[place] for place in range(len(jobs)))
    )


def write_results(result: ExperimentResult, folder: Path) -> Path:
    """Write `results.json` whole or not at all, and give its path; WorkFailedError if the disk refuses."""
    path = folder / RESULTS
    _write(path, to_json(result))
    return path


class JobStore:
    """What jobs found, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkFailedError(f"{folder}: cannot be made: {error.strerror or error}") from error
        try:
            # Told before an hour of work rather than after its first job.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise WorkFailedError(f"{folder}: cannot be written: {error.strerror or error}") from error

    def read(self, key: str) -> JobResult | None:
        """What is there of this job, None for nothing or for what is no result."""
        try:
            return job_from_json((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, key: str, value: JobResult) -> None:
        """Keep it."""
        _write(self._folder / f"{key}.json", to_json(value))


def _write(path: Path, data: bytes) -> None:
    stage = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        stage.write_bytes(data)
        os.replace(stage, path)
    except OSError as error:
        raise WorkFailedError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        stage.unlink(missing_ok=True)


def _act(job: Job, tell: Tell) -> JobResult:
    return measure(job, tell)


def _label(job: Job) -> str:
    return job.label
