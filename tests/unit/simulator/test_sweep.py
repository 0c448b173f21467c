"""A sweep gives the same whatever runs it, and leaves no process and no half of a result."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest

from loraserve.errors import BadInputError, WorkFailedError
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.figures import Judging, RunFigures
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.report import staged
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.result_files import TIMING
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.sweep import SweepRun, sweep
from loraserve.simulator.workload import SimulatedWorkload

Progress = Callable[[int, int], None] | None


def scenarios() -> list[Scenario]:
    profile = find_simulatable("a100-llama2-7b-bgmv")
    trace = SimulatedWorkload(source="demo", adapters=6, requests=300, rate_per_s=12.0).draw(0)
    return [
        scenario_of(profile, trace, ClusterOptions(num_replicas=2, policy=policy, epoch_s=5.0), seed=seed)
        for policy in ("least-loaded", "slora-random")
        for seed in (0, 1)
    ]


def told(figures: RunFigures) -> tuple[object, ...]:
    return figures.policy, figures.seed, figures.summary, figures.utilisation, figures.num_events


def dies(scenario: Scenario, *, on_progress: Progress) -> SimulationResult:
    if scenario.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return simulate(scenario, on_progress=on_progress)


def refuses(scenario: Scenario, *, on_progress: Progress) -> SimulationResult:
    raise BadInputError("no such thing")


def fails(scenario: Scenario, *, on_progress: Progress) -> SimulationResult:
    raise ZeroDivisionError("by\nnothing")


def test_results_are_the_same_bytes_in_one_process_and_in_several(tmp_path: Path) -> None:
    found, progress = {}, set()
    for jobs in (1, 3):
        runs = [
            SweepRun(scenario=scenario, folder=tmp_path / str(jobs) / str(place))
            for place, scenario in enumerate(scenarios())
        ]
        figures = sweep(
            runs, Judging(), jobs=jobs, on_progress=lambda place, done, total: progress.add((place, total))
        )
        files = sorted(path for path in (tmp_path / str(jobs)).rglob("*") if path.is_file())
        found[jobs] = (
            [told(one) for one in figures],
            [
                (path.relative_to(tmp_path / str(jobs)), path.read_bytes())
                for path in files
                if path.name != TIMING
            ],
        )
    assert found[1] == found[3]
    assert len(found[1][1]) == 4 * 6
    assert progress == {(place, 300) for place in range(4)}
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_one_run_is_one_line_and_ends_the_others(jobs: int) -> None:
    runs = [SweepRun(scenario=scenario) for scenario in scenarios()]
    with pytest.raises(BadInputError, match="no such thing"):
        sweep(runs, Judging(), jobs=jobs, simulate=refuses)
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_one_line_with_its_end() -> None:
    runs = [SweepRun(scenario=scenario) for scenario in scenarios()]
    with pytest.raises(WorkFailedError, match=r"seed 1: its process died \(SIGKILL\)"):
        sweep(runs, Judging(), jobs=2, simulate=dies)
    with pytest.raises(WorkFailedError, match=r"seed 0: ZeroDivisionError: by nothing$"):
        sweep(runs[::2], Judging(), jobs=2, simulate=fails)
    assert multiprocessing.active_children() == []


def test_an_interrupt_ends_every_process() -> None:
    def interrupt(place: int, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep([SweepRun(scenario=one) for one in scenarios()], Judging(), jobs=2, on_progress=interrupt)
    assert multiprocessing.active_children() == []


def test_an_interrupt_while_a_process_starts_ends_that_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = SpawnProcess.start, list[SpawnProcess]()

    def start_and_interrupt(self: SpawnProcess) -> None:
        start(self)
        started.append(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep([SweepRun(scenario=scenario) for scenario in scenarios()], Judging(), jobs=2)
    assert [process.is_alive() for process in started] == [False]


def test_what_was_begun_under_an_error_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def begin(error: type[BaseException]) -> None:
        with staged(out) as stage:
            (stage / "half").write_text("x")
            raise error

    for error in (KeyboardInterrupt, WorkFailedError):
        with pytest.raises(error):
            begin(error)
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_written_again_keeps_what_it_had_besides(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with staged(tmp_path / "out") as stage:
            (stage / "run").mkdir()
            (stage / "run" / content).write_text(content)
            (stage / "page").write_text(content)
        (tmp_path / "out" / "mine").write_text("mine")
    kept = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert kept == {"run", "run/second", "page", "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_preset_is_drawn_by_the_seed_and_a_trace_is_not() -> None:
    preset = SimulatedWorkload(source="preset:loraserve-skew", requests=50)
    assert preset.is_drawn
    assert not np.array_equal(preset.draw(0).arrival_s, preset.draw(1).arrival_s)
    demo = SimulatedWorkload(source="demo", limit=50)
    assert not demo.is_drawn
    assert np.array_equal(demo.draw(0).adapter, demo.draw(1).adapter)
    with_adapters = replace(demo, adapters=9, ranks="4,8", assign="zipf", base_share=0.5)
    assert {one.rank for one in with_adapters.draw(0).adapters} == {4, 8}
    assert not np.array_equal(with_adapters.draw(0).adapter, with_adapters.draw(1).adapter)
    assert 0 < (with_adapters.draw(0).adapter == -1).sum() < 50


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (SimulatedWorkload(source="demo", rate_per_s=1, speedup=2), "--rate and --speedup"),
        (SimulatedWorkload(source="demo", assign="zipf"), "want --adapters"),
        (SimulatedWorkload(source="demo", adapters=3, assign="nope"), "nope"),
        (SimulatedWorkload(source="demo", adapters=0), "--adapters: 0"),
        (SimulatedWorkload(source="preset:nope"), "no preset is called 'nope'"),
        (SimulatedWorkload(source="preset:slora", assign="zipf"), "draws its adapters by itself"),
        (SimulatedWorkload(source="preset:slora,rate=3", rate_per_s=4), "--rate: .* says it too"),
        (SimulatedWorkload(source="/no/such/file"), "/no/such/file"),
        (SimulatedWorkload(source="demo", ranks="names:a-rank-8-0"), "names 1 adapters, the trace has 5"),
    ],
)
def test_a_workload_that_cannot_be_is_refused_in_one_line(workload: SimulatedWorkload, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        workload.draw(0)
