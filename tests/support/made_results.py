"""A made-up simulation result from made-up runs of steps."""

from array import array

import numpy as np
from numpy.typing import NDArray

from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.simulator.result import EpochRecord, SimulationResult
from tests.support.made_runs import MadeRun
from traces.records import Outcome
from traces.runs.step_runs import ReplicaSteps


def result_of(made: MadeRun, *, policy: str = "made", seed: int = 0, wall_s: float = 0.5) -> SimulationResult:
    """The run as a simulation would have given it: one log per replica, one epoch."""
    columns = made.columns()
    failed = [index for index, one in enumerate(made.requests) if one.outcome is Outcome.FAILED]
    last = [one.stretches[-1].replica if one.stretches else -1 for one in made.requests]
    count = len(made.requests)
    return SimulationResult(
        arrival_ps=columns.arrival_ps,
        first_ps=columns.first_ps,
        end_ps=columns.end_ps,
        prompt_tokens=columns.prompt_tokens,
        output_tokens=columns.output_tokens,
        drawn_tokens=columns.output_tokens,
        adapter=columns.adapter,
        adapters=made.adapters,
        replica=np.array(last, dtype=np.int32),
        replica_ids=tuple(f"replica-{place}" for place in range(len(made.replicas))),
        router=np.zeros(count, dtype=np.int16),
        attempts=np.ones(count, dtype=np.int16),
        outcome=columns.outcome,
        statuses={index: f"broke off at {index}" for index in failed},
        logs=tuple(_log(steps) for steps in made.steps()),
        log_replica=tuple(range(len(made.replicas))),
        epochs=(
            EpochRecord(
                time_ps=7,
                table_version=2,
                copies=(1,) * len(made.replicas),
                resident_bytes=5,
                bytes_moved=11,
                loads=1,
                cold_misses=3,
            ),
        ),
        policy=policy,
        routing="least-outstanding",
        seed=seed,
        wall_s=wall_s,
        num_events=count,
        bytes_moved=11,
        cold_misses=3,
        scenario={"trace": "made", "requests": count},
    )


def _log(steps: ReplicaSteps) -> ReplicaLog:
    runs = len(steps.run_step)
    return ReplicaLog(
        run_step=_array(steps.run_step),
        run_ps=_array(steps.run_ps),
        run_step_ps=_array(steps.run_step_ps),
        run_growth_ps=_array(steps.run_growth_ps),
        run_rows=array("q", [1] * runs),
        run_prefill_tokens=array("q", [0] * runs),
        run_max_rank=array("q", [8 + 8 * (place % 2) for place in range(runs)]),
        run_blocks=array("q", [1] * runs),
        num_steps=steps.num_steps,
        stretch_request=_array(steps.stretch_request),
        stretch_first=_array(steps.stretch_first),
        stretch_last=_array(steps.stretch_last),
    )


def _array(column: NDArray[np.int64]) -> "array[int]":
    return array("q", column.astype(np.int64).tobytes())
