"""Fitting the latency model: known models come back, past outliers too, from the batches planned."""

import dataclasses
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.profiling.batches import Batch, BatchLimits, RankedName, plan_batches
from loraserve.profiling.fit import PromptPart, TimedStep, fit_latency, recommend
from placement.latency import LatencyModel, RankKernel, StepCounts

MAX_RANK = 256
ADAPTERS: dict[str | None, int] = {None: 0, "r8-a": 8, "r8-b": 8, "r32-a": 32, "r128-a": 128, "r128-b": 128}
LIMITS = BatchLimits(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len_tokens=2048, adapter_slots=8)
COEFFICIENTS = [field.name for field in dataclasses.fields(LatencyModel) if field.name.endswith("_ms")]


def planned(*, quick: bool = False) -> tuple[Batch, ...]:
    named = [RankedName(name=name, rank=rank) for name, rank in ADAPTERS.items() if name]
    return plan_batches(named, LIMITS, quick=quick)


def step_of(batch: Batch) -> TimedStep:
    ranks = ADAPTERS
    return TimedStep(
        ms=1.0,
        decode_ranks=tuple(ranks[one] for one in batch.decode),
        context_tokens=len(batch.decode) * (batch.context_tokens + 6),
        prompts=tuple(PromptPart(tokens=tokens, rank=ranks[one]) for tokens, one in batch.prompts),
        adapters=len(batch.adapters),
    )


def timed(
    model: LatencyModel, *, repetitions: int, noise: float, outliers: float, seed: int
) -> list[TimedStep]:
    drawn = Random(seed)
    steps = []
    for step in [step_of(batch) for batch in planned()] * repetitions:
        ms = model.step_ms(step.counts(model.kernel, MAX_RANK)) * drawn.gauss(1.0, noise)
        slow = drawn.uniform(1.5, 5.0) if drawn.random() < outliers else 1.0
        steps.append(dataclasses.replace(step, ms=ms * slow))
    return steps


def models() -> st.SearchStrategy[LatencyModel]:
    return st.builds(
        LatencyModel,
        kernel=st.sampled_from(RankKernel),
        max_lora_rank=st.just(MAX_RANK),
        base_ms=st.floats(1, 50),
        row_ms=st.floats(0, 0.5),
        prefill_token_ms=st.floats(0.01, 0.5),
        prefill_pair_ms=st.just(0.0) | st.floats(1e-5, 1e-4),
        context_token_ms=st.just(0.0) | st.floats(1e-4, 1e-3),
        lora_step_ms=st.floats(0, 3),
        adapter_ms=st.floats(0, 0.5),
        decode_rank_ms=st.floats(0.001, 0.05),
        prefill_rank_ms=st.floats(1e-4, 0.01),
    )


@settings(deadline=None, max_examples=40)
@given(model=models())
def test_the_planned_batches_give_an_exact_model_back(model: LatencyModel) -> None:
    steps = timed(model, repetitions=1, noise=0.0, outliers=0.0, seed=0)
    found = fit_latency(steps, model.kernel, MAX_RANK)
    assert found.fit.p95_relative_error < 0.01
    # What a term adds to a step is told to 2 % of the step.
    for step in steps:
        counts = step.counts(model.kernel, MAX_RANK)
        for name in ("decode_rank_ms", "prefill_rank_ms"):
            value = getattr(counts, name.removesuffix("_ms"))
            added = abs(getattr(found.model, name) - getattr(model, name)) * value
            assert added < 0.02 * step.ms, name


@settings(deadline=None, max_examples=25)
@given(model=models(), outliers=st.floats(0, 0.15), seed=st.integers(0, 2**32))
def test_slow_steps_do_not_bend_the_model(model: LatencyModel, outliers: float, seed: int) -> None:
    steps = timed(model, repetitions=4, noise=0.02, outliers=outliers, seed=seed)
    found = fit_latency(steps, model.kernel, MAX_RANK).model
    errors = sorted(
        abs(found.step_ms(counts) / model.step_ms(counts) - 1)
        for counts in (step.counts(model.kernel, MAX_RANK) for step in steps)
    )
    assert errors[len(errors) // 2] < 0.02
    # A term that few batches vary may be bent where most of their repetitions were slow.
    assert errors[len(errors) * 9 // 10] < 0.05


@pytest.mark.parametrize("kernel", RankKernel)
def test_the_kernel_that_made_the_steps_is_recommended(kernel: RankKernel) -> None:
    model = LatencyModel(
        kernel=kernel, max_lora_rank=MAX_RANK, base_ms=10, row_ms=0.2, prefill_token_ms=0.1,
        decode_rank_ms=0.01, prefill_rank_ms=0.002,
    )  # fmt: skip
    found = recommend(timed(model, repetitions=3, noise=0.02, outliers=0.05, seed=1), MAX_RANK)
    assert found.best.model.kernel is kernel
    assert ": clear" in found.how_sure
    assert found.best.model.decode_rank_ms == pytest.approx(0.01, rel=0.05)


def test_steps_without_adapters_do_not_tell_the_kernels_apart() -> None:
    model = LatencyModel(base_ms=10, row_ms=0.2, prefill_token_ms=0.1)
    steps = [
        step for step in timed(model, repetitions=2, noise=0.02, outliers=0, seed=1) if not step.adapters
    ]
    found = recommend(steps, MAX_RANK)
    assert "not to be told apart" in found.how_sure
    assert found.best.model.decode_rank_ms == 0


def test_each_kernel_charges_its_own_ranks() -> None:
    step = TimedStep(
        ms=1.0,
        decode_ranks=(0, 8, 32),
        context_tokens=50,
        prompts=(PromptPart(tokens=10, rank=64), PromptPart(tokens=3, rank=0)),
        adapters=3,
    )
    told = {kernel: step.counts(kernel, 128) for kernel in RankKernel}
    assert told[RankKernel.SUM] == StepCounts(
        rows=5, prefill_tokens=13, prefill_pairs=48, context_tokens=50, adapters=3, decode_rank=40,
        prefill_rank=640,
    )  # fmt: skip
    assert (told[RankKernel.PADDED_BATCH].decode_rank, told[RankKernel.PADDED_BATCH].prefill_rank) == (
        128,
        640,
    )
    assert (told[RankKernel.PADDED_CONFIG].decode_rank, told[RankKernel.PADDED_CONFIG].prefill_rank) == (
        256,
        1280,
    )


def test_steps_that_cannot_be_fitted_are_refused() -> None:
    for steps in ([], [TimedStep(ms=0.0, decode_ranks=(0,))]):
        with pytest.raises(ValueError, match="expected timed steps"):
            fit_latency(steps, RankKernel.SUM, 128)


@given(
    ranks=st.lists(st.sampled_from([8, 16, 64, 128]), min_size=1, max_size=6),
    max_num_seqs=st.integers(3, 64),
    max_num_batched_tokens=st.integers(40, 4096),
    max_model_len_tokens=st.integers(64, 4096),
    adapter_slots=st.integers(1, 8),
    quick=st.booleans(),
)
def test_planned_batches_fit_the_engine(
    ranks: list[int],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len_tokens: int,
    adapter_slots: int,
    quick: bool,
) -> None:
    limits = BatchLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len_tokens=max_model_len_tokens,
        adapter_slots=adapter_slots,
    )
    named = [RankedName(name=f"a{number}", rank=rank) for number, rank in enumerate(ranks)]
    batches = plan_batches(named, limits, quick=quick)
    assert len({batch.name for batch in batches}) == len(batches)
    for batch in batches:
        assert len(batch.decode) + len(batch.prompts) <= max_num_seqs
        assert len(batch.decode) + batch.prompt_tokens <= max_num_batched_tokens
        assert max(batch.context_tokens, batch.prompt_tokens) <= max_model_len_tokens
        assert len(batch.adapters) <= adapter_slots
        assert batch.decode
