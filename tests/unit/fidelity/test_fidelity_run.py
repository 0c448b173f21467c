"""A comparison from beginning to end where the live side is a simulation too."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from loraserve.errors import BadInputError, WorkFailedError
from loraserve.fidelity.explain import explain
from loraserve.fidelity.figures import KINDS, compare
from loraserve.fidelity.fit import first_token_left_ms, fit_overheads, gap_ratio
from loraserve.fidelity.options import FidelityOptions, Lengths, as_engine
from loraserve.fidelity.processors import ProcessorMeter, ProcessorUse
from loraserve.fidelity.run import run_fidelity
from loraserve.fidelity.setup import EMULATED, cluster_config, emulated_model
from loraserve.fidelity.simulated import Overheads, saturated_requests_per_s, simulated_runs
from loraserve.fidelity.workload import flood, workload_at
from loraserve.samples import SampleSet
from placement.latency import RankKernel
from tests.support.fidelity_kit import SHORT, SimulatedLive, subject_for

HIDDEN = Overheads(step_factor=1.12, prefill_factor=1.5, message_delay_s=0.004)


async def test_a_simulation_is_predicted_without_error() -> None:
    options, subject = replace(SHORT, draws=1), subject_for(SHORT)
    told: list[str] = []
    live = SimulatedLive(subject, Overheads())
    report = await run_fidelity(live, subject, options, "the test's", told.append)
    assert report.saturation.live_ratio == pytest.approx(1.0)
    assert report.fit.overheads.step_factor == pytest.approx(1.0, abs=1e-6)
    assert [load.load for load in report.scored] == [0.5, 0.9, 1.1]
    for load in (report.fitted, *report.scored):
        assert [one.error for one in load.compared] == pytest.approx([0.0] * len(KINDS), abs=1e-6)
        assert not load.explanations
    assert report.met
    assert max(report.worst().values()) < 1e-6
    assert any("saturates" in line for line in told)


async def test_hidden_overheads_are_found_on_one_load_and_hold_on_the_others() -> None:
    subject = subject_for(SHORT)
    report = await run_fidelity(SimulatedLive(subject, HIDDEN), subject, SHORT, "the test's", print)
    assert 1 / HIDDEN.prefill_factor < report.saturation.live_ratio < 1 / HIDDEN.step_factor
    assert report.fit.overheads.step_factor == pytest.approx(HIDDEN.step_factor, rel=1e-3)
    assert report.fit.overheads.prefill_factor == pytest.approx(HIDDEN.prefill_factor, rel=1e-3)
    assert report.fit.overheads.message_delay_s == pytest.approx(HIDDEN.message_delay_s, abs=0.002)
    assert report.met, [load.compared for load in report.scored]


async def test_what_the_overheads_cannot_stand_for_is_missed_and_explained() -> None:
    """A cluster whose batches hold half as many: no factor on the steps explains its queues."""
    subject = subject_for(SHORT)
    limits = subject_for(SHORT).limits
    small = subject_for(SHORT, limits=type(limits)(kv_blocks=1000, max_num_seqs=2))
    use = ProcessorUse(processors=2, wall_s=1.0, busy={"router": 1.5, "others": 0.4})
    live = SimulatedLive(small, Overheads(), use=use)
    report = await run_fidelity(live, subject, SHORT, "the test's", print)
    assert report.saturation.live_ratio < 0.8
    assert not report.met
    missed = next(load for load in report.scored if load.missed)
    said = "\n".join(missed.explanations)
    assert "router 75%" in said
    assert "20% of the machine went to programs outside" in said
    assert "in this load alone, steps took" in said
    assert "the live run's percentile" in said
    assert max(report.worst().values()) > 0.05


async def test_a_load_beside_other_programs_is_void_and_proves_nothing() -> None:
    options, subject = replace(SHORT, draws=1, loads=(0.5,)), subject_for(SHORT)
    busy = ProcessorUse(processors=2, wall_s=1.0, busy={"others": 0.4})
    live = SimulatedLive(subject, Overheads(), use=busy, max_others=0.1)
    report = await run_fidelity(live, subject, options, "the test's", print)
    assert "took 20% of the machine, above 10%" in report.scored[0].void_reason
    assert not report.scored[0].missed
    assert not report.met
    assert report.worst() == {}
    assert replace(options, engine="vllm").max_others < options.max_others == 1.0


async def test_a_cluster_without_a_token_cannot_be_compared() -> None:
    subject = subject_for(SHORT)
    none = subject_for(SHORT, max_waiting=1, limits=type(subject.limits)(kv_blocks=1, max_num_seqs=1))
    with pytest.raises(WorkFailedError, match="no token came"):
        await run_fidelity(SimulatedLive(none, Overheads()), subject, SHORT, "the test's", print)


def test_overheads_are_fitted_from_records_alone() -> None:
    subject = subject_for(SHORT)
    trace = workload_at(SHORT, 10.0, 10.0, part=1)
    (live,) = simulated_runs(subject, trace, HIDDEN, draws=1)
    predict = partial(simulated_runs, subject, trace, draws=1)
    plain = predict(Overheads())
    assert 1.12 < gap_ratio(live, plain) < 1.5
    assert first_token_left_ms(live, plain) > 5
    assert gap_ratio(live, [live]) == 1.0
    assert first_token_left_ms(live, [live]) == 0.0
    fit = fit_overheads(live, predict, subject.latency)
    after = compare(live, predict(fit.overheads), SHORT.targets)
    assert all(one.met for one in after)
    with pytest.raises(ValueError, match="no gap"):
        gap_ratio((), plain)
    with pytest.raises(ValueError, match="no request"):
        first_token_left_ms((), plain)


def test_saturation_is_what_full_batches_do() -> None:
    subject = subject_for(SHORT)
    rate = saturated_requests_per_s(subject, flood(SHORT), Overheads())
    twice = saturated_requests_per_s(subject, flood(SHORT), Overheads(step_factor=2.0, prefill_factor=2.0))
    assert twice == pytest.approx(rate / 2, rel=0.01)
    lengths = SHORT.lengths
    rows = subject.limits.max_num_seqs
    # Every step of a full batch draws a token per row; prompts only add to it.
    most = 2 * rows / (20 + 0.5 * rows) * 1e3 / (sum(lengths.output) / 2)
    assert 0.5 * most < rate < most


def test_workloads_have_their_rate_and_every_rank() -> None:
    options = FidelityOptions(ranks=(8, 32, 128), seed=3)
    trace = workload_at(options, 20.0, 50.0, part=1)
    assert len(trace) == 1000
    assert 40 < trace.duration_s <= 50
    assert {adapter.rank for adapter in trace.adapters} == {8, 32, 128}
    assert np.bincount(trace.adapter, minlength=6).min() > 100
    assert trace.prompt_tokens.max() + trace.output_tokens.max() <= options.lengths.longest
    other = workload_at(options, 20.0, 50.0, part=2)
    assert not np.array_equal(trace.arrival_s, other.arrival_s)
    assert {one.name for one in other.adapters} == {one.name for one in flood(options).adapters}


def test_the_emulated_engine_is_simulated_as_it_is_configured(samples: SampleSet) -> None:
    options = FidelityOptions(ranks=(8, 100))
    config = cluster_config(options, samples.model, "fidelity-1", samples.model.parent / "clusters")
    latency, limits = emulated_model(config)
    assert latency.base_ms == EMULATED["emulated.base_step_ms"]
    assert latency.kernel is RankKernel.PADDED_BATCH
    assert config.engine.max_lora_rank == 128
    assert limits.adapter_slots == config.engine.adapter_slots == 4
    with pytest.raises(BadInputError, match="max_model_len_tokens"):
        cluster_config(
            FidelityOptions(lengths=Lengths(prompt=(1, 1000))), samples.model, "a", samples.model.parent
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replicas": 0}, "--replicas 0"),
        ({"ranks": ()}, "--ranks"),
        ({"ranks": (8, 8)}, "--ranks 8,8"),
        ({"loads": (0.5, 9.0)}, "--loads 0.5,9"),
        ({"fit_load": 1.0}, "--fit-load 1"),
        ({"duration_s": 0.5}, "--duration 0.5"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        FidelityOptions(**changes)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="--engine warp"):
        as_engine("warp")


def test_a_figure_is_explained_by_what_it_makes_of_little() -> None:
    subject = subject_for(SHORT)
    trace = workload_at(SHORT, 5.0, 5.0, part=1)
    predict = partial(simulated_runs, subject, trace, draws=2)
    live = predict(Overheads())[0]
    fit = fit_overheads(live, predict, subject.latency)
    use = ProcessorUse(processors=2, wall_s=1.0, busy={})
    assert explain((), use, fit, None, (), ()) == ()
    compared = compare(live, [live], SHORT.targets)
    ttft = next(one for one in compared if one.name == "ttft_p50_ms")
    low, high = (replace(ttft, simulated=factor * ttft.simulated) for factor in (0.7, 1.6))
    said = "\n".join(explain([ttft], use, fit, fit, [], [[low], [high]]))
    assert "with steps 3% shorter or longer the simulator says" in said
    assert "TTFT p50, ms: what the simulator says is the live run's percentile" in said
    assert "others" not in said
    assert "would then be met" in said
    calm = "\n".join(explain([ttft], use, fit, fit, [ttft], [[ttft], [ttft]]))
    assert "shorter or longer" not in calm
    assert "none of the figures missed would then be met" in calm


def test_processor_time_is_counted_per_part() -> None:
    meter = ProcessorMeter(lambda: {"router": ()})
    total = 0
    for number in range(2_000_000):
        total += number
    use = meter.use()
    assert total > 0
    assert use.busy["router"] == 0.0
    assert 0.0 < use.busy["client"] <= use.processors + 0.1
    assert use.busy["others"] >= 0.0
