"""An experiment gives the same bytes however it came about: at once, side by side, or in pieces."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from loraserve.errors import BadInputError, WorkFailedError
from loraserve.experiments.jobs import job_key, jobs_of_experiment
from loraserve.experiments.results import ExperimentResult, job_from_json, read_results, to_json
from loraserve.experiments.run import JOBS, RESULTS, JobStore, Progress, run_experiment, write_results
from loraserve.experiments.spec import parse_experiment
from tests.support.experiments import small_tree

EXPERIMENT = parse_experiment(small_tree())


class EndedError(Exception):
    """As a signal would."""


def run_all(folder: Path, *, processes: int = 1, stop_after: int | None = None) -> ExperimentResult:
    told: list[tuple[int, int, int]] = []

    def on_done(done: int, total: int, before: int) -> None:
        told.append((done, total, before))
        if stop_after is not None and done - before >= stop_after:
            raise EndedError

    jobs = jobs_of_experiment(EXPERIMENT, Path())
    progress = Progress(on_step=lambda label, what: None, on_done=on_done)
    result = run_experiment("small", EXPERIMENT, jobs, folder, processes=processes, progress=progress)
    assert told[-1][:2] == (len(jobs), len(jobs))
    write_results(result, folder)
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_all(folder)
    return folder


def test_a_resumed_experiment_equals_an_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(EndedError):
            run_all(tmp_path, stop_after=3)
    assert not (tmp_path / RESULTS).exists()
    kept = sorted(path.name for path in (tmp_path / JOBS).iterdir())
    assert len(kept) == 6
    stamps = {name: (tmp_path / JOBS / name).stat().st_mtime_ns for name in kept}
    run_all(tmp_path, processes=2)
    assert (tmp_path / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()
    # What was there has not been made again.
    assert stamps == {name: (tmp_path / JOBS / name).stat().st_mtime_ns for name in kept}


def test_results_survive_the_disk(whole: Path) -> None:
    result = read_results(whole / RESULTS)
    assert to_json(result) == (whole / RESULTS).read_bytes()
    for job in result.jobs:
        assert job_from_json(to_json(job)) == job


def test_half_a_file_and_one_of_something_else_are_made_again(whole: Path, tmp_path: Path) -> None:
    jobs = jobs_of_experiment(EXPERIMENT, Path())
    store = JobStore(tmp_path / JOBS)
    half, other = job_key(jobs[0]), job_key(jobs[1])
    (tmp_path / JOBS / f"{half}.json").write_bytes((whole / JOBS / f"{half}.json").read_bytes()[:100])
    (tmp_path / JOBS / f"{other}.json").write_text('{"trace": "else"}')
    assert store.read(half) is None
    assert store.read(other) is None
    run_all(tmp_path)
    assert (tmp_path / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()


def test_the_highest_rate_lies_between_what_held_and_what_failed(whole: Path) -> None:
    found = read_results(whole / RESULTS)
    searched = [job for job in found.jobs if job.highest is not None]
    assert len(searched) == 4
    for job in searched:
        assert job.highest is not None
        inside = [point.rate_per_s for point in job.points if point.in_slo]
        tried = {probe.rate_per_s: probe.held for probe in job.highest.probes}
        tried |= {point.rate_per_s: point.in_slo for point in job.points}
        assert tried[job.highest.held_per_s]
        assert not tried[job.highest.failed_per_s]
        assert job.highest.held_per_s >= max(inside, default=0)
        assert job.highest.held_per_s < job.highest.failed_per_s <= job.highest.held_per_s * 1.1001


def test_the_fewest_replicas_hold_and_one_less_does_not(whole: Path) -> None:
    searched = [job for job in read_results(whole / RESULTS).jobs if not job.replicas]
    assert len(searched) == 4
    for job in searched:
        (fewest,) = job.fewest
        tried = {probe.replicas: probe.held for probe in fewest.probes}
        assert tried[fewest.replicas]
        assert fewest.replicas == 1 or not tried[fewest.replicas - 1]


def test_only_the_first_seed_keeps_its_map(whole: Path) -> None:
    for job in read_results(whole / RESULTS).jobs:
        assert (job.rank_map is not None) == (job.seed == 0 and job.replicas > 0)
        if job.rank_map is not None:
            assert len(job.rank_map.rank) == len(job.rank_map.busy) == job.replicas
            assert job.rank_map.rate_per_s == pytest.approx(1.1 * job.fluid_per_s)


def test_a_job_that_does_not_fit_is_refused_with_its_name(tmp_path: Path) -> None:
    experiment = parse_experiment(
        small_tree(traces=[{"name": "wide", "source": "preset:loraserve-uniform", "ranks": "8,256"}])
    )
    jobs = jobs_of_experiment(experiment, Path())
    with pytest.raises(
        BadInputError, match=r"^wide, optimal, 2 replicas, padded_batch, seed [01]: adapter .*rank 256"
    ):
        run_experiment("wide", experiment, jobs, tmp_path, processes=2)


def test_a_disk_that_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / JOBS).write_text("a file")
    with pytest.raises(WorkFailedError, match="jobs: cannot be made"):
        run_all(tmp_path)


def test_a_folder_that_takes_no_files_is_refused_before_anything_runs(tmp_path: Path) -> None:
    # A folder of the kernel's, in which not even root makes files.
    (tmp_path / JOBS).symlink_to("/proc/self/task")
    jobs = jobs_of_experiment(EXPERIMENT, Path())
    done: list[int] = []
    progress = Progress(on_step=lambda *_: done.append(1), on_done=lambda *_: done.append(1))
    with pytest.raises(WorkFailedError, match="jobs: cannot be written"):
        run_experiment("small", EXPERIMENT, jobs, tmp_path, processes=1, progress=progress)
    assert not done


@pytest.mark.asyncio
async def test_what_a_killed_command_has_found_is_not_lost(whole: Path, tmp_path: Path) -> None:
    from tests.support.cli import finish_cli, start_cli

    (tmp_path / "small.toml").write_text(_toml())
    out = tmp_path / "out"
    arguments = ("simulate", str(tmp_path / "small.toml"), "--out", str(out), "--json")
    process = await start_cli(*arguments)
    async with asyncio.timeout(60):
        while len(list((out / JOBS).glob("[!.]*.json"))) < 2:
            assert process.returncode is None, "it ended before it could be killed"
            await asyncio.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    assert not (out / RESULTS).exists()
    again = await finish_cli(await start_cli(*arguments))
    assert again.exit_code == 0, again.stderr
    told = again.json()
    assert told["out"] == str(out)
    assert len(told["jobs"]) == len(read_results(whole / RESULTS).jobs)
    assert "from an earlier run" in again.stderr
    ours, theirs = (json.loads((folder / RESULTS).read_text()) for folder in (out, whole))
    assert ours["jobs"] == theirs["jobs"]


def _toml() -> str:
    return """
title = "A small one"
policies = ["optimal", "slora-random"]
replicas = [2]
rates = ["0.6x", "1.1x"]
seeds = [0, 1]
kernels = ["padded_batch"]
[cluster]
duration_s = 12
warmup_s = 2
epoch_s = 3
[find]
highest_rate = true
tolerance = 0.1
fewest_replicas_at = [8]
most_replicas = 3
[[traces]]
name = "uniform"
source = "preset:loraserve-uniform"
adapters = 5
"""
