"""The steps of replicas as a client sees them, against those that the simulator made."""

from dataclasses import replace

import pytest

from loraserve.fidelity.simulated import Overheads, simulated_runs
from loraserve.fidelity.steps import seen_steps, step_factors
from loraserve.fidelity.time_steps import known_kernel
from loraserve.fidelity.workload import workload_at
from loraserve.profiling.fit import recommend
from placement.latency import LatencyModel, RankKernel
from tests.support.fidelity_kit import SHORT, subject_for
from traces.records import RequestRecord

MODEL = LatencyModel(
    base_ms=20, row_ms=0.5, prefill_token_ms=0.1, prefill_pair_ms=1e-3, context_token_ms=1e-3,
    lora_step_ms=1, adapter_ms=0.5, decode_rank_ms=0.005, prefill_rank_ms=1e-3,
)  # fmt: skip


def records_of(overheads: Overheads, *, rate: float = 8.0) -> tuple[RequestRecord, ...]:
    (records,) = simulated_runs(
        subject_for(SHORT, latency=MODEL), workload_at(SHORT, rate, 10.0, part=1), overheads, draws=1
    )
    return records


def test_every_step_seen_takes_what_the_model_says() -> None:
    steps = seen_steps(records_of(Overheads()))
    assert len(steps) > 200
    assert sum(len(step.prompts) == 1 for step in steps) > 20
    for step in steps:
        counts = step.counts(MODEL.kernel, MODEL.max_lora_rank)
        assert step.ms == pytest.approx(MODEL.step_ms(counts), abs=1e-3), step


def test_both_factors_are_told_apart_also_under_jitter() -> None:
    records = records_of(Overheads(step_factor=1.2, prefill_factor=1.7))
    factors = step_factors(records, MODEL)
    assert factors.decode == pytest.approx(1.2, rel=1e-4)
    assert factors.prefill == pytest.approx(1.7, rel=1e-3)
    # Messages of one step come up to 2 ms apart, in no order.
    shaken = tuple(
        replace(
            record,
            message_times_s=tuple(
                at_s + 1e-3 * ((7 * record.index + 3 * place) % 3)
                for place, at_s in enumerate(record.message_times_s)
            ),
        )
        for record in records
    )
    factors = step_factors(shaken, MODEL)
    assert 0.9 < factors.spread[0] < 1.2 < factors.spread[1] < 1.8
    assert factors.decode == pytest.approx(1.2, rel=0.02)
    assert factors.prefill == pytest.approx(1.7, rel=0.1)


def test_too_few_steps_say_nothing() -> None:
    assert step_factors((), MODEL).decode == 1.0
    few = step_factors(records_of(Overheads(step_factor=2.0, prefill_factor=2.0), rate=0.3), MODEL)
    assert few.prefill_steps < 20
    assert few.prefill == few.decode


def test_the_kernel_of_timed_steps_is_the_one_that_the_execution_has() -> None:
    steps = seen_steps(records_of(Overheads()))
    found = recommend(steps, 128)
    assert known_kernel(found, "rank-true").model.kernel is RankKernel.SUM
    assert known_kernel(found, "stock").model.kernel is RankKernel.PADDED_CONFIG
