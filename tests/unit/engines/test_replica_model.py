"""The replica model against a plain reference, and its conservation laws."""

import weakref
from collections.abc import Sequence as Many
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engines.replica_model.model import ENDLESS, ReplicaModel
from loraserve.engines.replica_model.sequence import Phase, ReplicaLimits, Sequence
from placement.latency import PS_PER_S, LatencyModel, RankKernel, StepCost
from placement.types import VersionId
from tests.support.reference_replica import Reference, Request
from tests.support.replica_logs import step_ends, token_times

COST = StepCost.of(
    LatencyModel(
        base_ms=4.0,
        row_ms=0.1,
        prefill_token_ms=0.02,
        prefill_pair_ms=1e-5,
        context_token_ms=3e-4,
        lora_step_ms=0.5,
        adapter_ms=0.05,
        decode_rank_ms=0.002,
        prefill_rank_ms=0.0004,
    )
)
RANKS = (8, 16, 64)
NAME_TOKENS = 32


@st.composite
def loads(draw: st.DrawFn) -> tuple[ReplicaLimits, StepCost, list[Request]]:
    max_num_seqs = draw(st.integers(1, 6))
    limits = ReplicaLimits(
        kv_blocks=draw(st.integers(14, 40)),
        block_tokens=8,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 64)),
        hash_block_tokens=NAME_TOKENS,
        adapter_slots=len(RANKS),
    )
    cost = replace(COST, kernel=draw(st.sampled_from(RankKernel)))
    has_names = draw(st.booleans())
    requests, at_ps = [], 0
    for number in range(draw(st.integers(1, 14))):
        at_ps += draw(st.sampled_from((0, 1, 7_000_000_000, 40_000_000_000, PS_PER_S)))
        prompt_tokens = draw(st.integers(1, 70))
        rank = draw(st.sampled_from((0, *RANKS)))
        family = draw(st.integers(0, 1))
        names = tuple(family * 100 + place for place in range(-(-prompt_tokens // NAME_TOKENS)))
        requests.append(
            Request(
                number=number,
                at_ps=at_ps,
                prompt_tokens=prompt_tokens,
                output_tokens=draw(st.integers(1, 40)),
                rank=rank,
                adapter=f"rank-{rank}" if rank else None,
                names=names if has_names else (),
            )
        )
    return limits, cost, requests


def sequence_of(one: Request) -> Sequence:
    version = None if one.adapter is None else VersionId(one.adapter)
    return Sequence(one.number, one.prompt_tokens, one.output_tokens, one.rank, version, one.names)


def filled_model(limits: ReplicaLimits, cost: StepCost, max_run_steps: int = ENDLESS) -> ReplicaModel:
    model = ReplicaModel(limits, cost, max_run_steps=max_run_steps)
    for rank in RANKS:
        model.hold(VersionId(f"rank-{rank}"), rank, 1000, 0)
    return model


def drive(model: ReplicaModel, requests: Many[Request], looks_ps: Many[int] = ()) -> dict[int, Sequence]:
    """Submit everything at its time, look at the model at other times too, and run it to its end."""
    sequences = {one.number: sequence_of(one) for one in requests}
    moments = sorted([(one.at_ps, one) for one in requests] + [(at, None) for at in looks_ps], key=_time)
    for at_ps, request in moments:
        model.advance(at_ps)
        model.check_invariants()
        if request is not None:
            model.submit(sequences[request.number], at_ps)
    while (next_ps := model.next_ps()) is not None:
        model.advance(next_ps + 1)
    return sequences


def _time(moment: tuple[int, Request | None]) -> int:
    return moment[0]


@given(loads())
@settings(max_examples=300, deadline=None)
def test_runs_in_closed_form_are_the_reference_step_by_step(
    load: tuple[ReplicaLimits, StepCost, list[Request]],
) -> None:
    limits, cost, requests = load
    fitting = [one for one in requests if limits.fits(one.prompt_tokens, one.output_tokens)]
    model = filled_model(limits, cost)
    sequences = drive(model, fitting)
    reference = Reference(limits, cost)
    reference.run(list(fitting))
    assert step_ends(model.log) == reference.steps
    assert token_times(model.log) == {one.number: one.token_ps for one in fitting}
    assert model.batch.preemptions == reference.preemptions
    for one in fitting:
        assert sequences[one.number].first_ps == one.token_ps[0]
        assert sequences[one.number].last_ps == one.token_ps[-1]
    model.check_invariants()
    assert (model.running, model.waiting, model.outstanding_tokens) == (0, 0, 0)


@given(loads(), st.lists(st.integers(0, 3 * PS_PER_S), max_size=20), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_it_makes_no_difference_when_one_looks_nor_how_many_steps_are_taken_at_once(
    load: tuple[ReplicaLimits, StepCost, list[Request]], looks_ps: list[int], max_run_steps: int
) -> None:
    limits, cost, requests = load
    fitting = [one for one in requests if limits.fits(one.prompt_tokens, one.output_tokens)]
    whole, watched = filled_model(limits, cost), filled_model(limits, cost, max_run_steps)
    drive(whole, fitting)
    drive(watched, fitting, looks_ps)
    assert token_times(watched.log) == token_times(whole.log)
    assert step_ends(watched.log) == step_ends(whole.log)


@given(loads(), st.data())
@settings(max_examples=150, deadline=None)
def test_cancelled_and_lost_requests_leave_nothing_behind(
    load: tuple[ReplicaLimits, StepCost, list[Request]], data: st.DataObject
) -> None:
    limits, cost, requests = load
    limits = replace(limits, adapter_slots=data.draw(st.integers(1, 3)), load_bytes_per_s=20_000.0)
    fitting = [one for one in requests if limits.fits(one.prompt_tokens, one.output_tokens)]
    model = filled_model(limits, cost)
    sequences = {one.number: sequence_of(one) for one in fitting}
    cancelled = 0
    for one in fitting:
        model.advance(one.at_ps)
        model.submit(sequences[one.number], one.at_ps)
        if data.draw(st.booleans()):
            victim = sequences[data.draw(st.sampled_from([known.number for known in fitting]))]
            before = model.drawn(victim)
            alive = victim.phase is not Phase.ENDED and victim.request <= one.number
            if alive:
                model.cancel(victim, one.at_ps)
                cancelled += victim not in model.finished
                assert victim.drawn >= before
        model.check_invariants()
    if data.draw(st.booleans()):
        lost = model.fail(fitting[-1].at_ps + 10**9) if fitting else []
        assert len(lost) + len(model.finished) + cancelled == len(fitting)
    else:
        while (next_ps := model.next_ps()) is not None:
            model.advance(next_ps + 1)
        assert len(model.finished) + cancelled == len(fitting)
    model.check_invariants()
    assert (model.running, model.waiting, model.outstanding_tokens) == (0, 0, 0)
    assert all(one.drawn <= one.output_tokens for one in sequences.values())
    drawn = {number: len(times) for number, times in token_times(model.log).items()}
    assert drawn == {number: one.drawn for number, one in sequences.items() if one.drawn}


def test_an_empty_replica_gives_the_latency_model_s_own_figures() -> None:
    model = ReplicaModel(ReplicaLimits(kv_blocks=100), COST)
    sequence = Sequence(0, 100, 3)
    model.submit(sequence, 5 * PS_PER_S)
    model.advance(9 * PS_PER_S)
    first_ps = COST.base + COST.row + 100 * COST.prefill_token + 4950 * COST.prefill_pair
    rest_ps = 2 * (COST.base + COST.row) + (101 + 102) * COST.context_token
    assert sequence.first_ps == 5 * PS_PER_S + first_ps
    assert sequence.last_ps == sequence.first_ps + rest_ps
    assert model.finished == [sequence]


def test_a_request_waits_for_its_adapter_and_others_overtake_it() -> None:
    limits = ReplicaLimits(kv_blocks=100, load_bytes_per_s=1000.0)
    model = ReplicaModel(limits, COST)
    cold, other = Sequence(0, 10, 1, 8, VersionId("cold")), Sequence(1, 10, 1)
    model.submit(cold, 0)
    model.submit(other, 0)
    model.advance(PS_PER_S)
    assert (model.wanted, model.waiting, other.last_ps > 0) == ([VersionId("cold")], 1, True)
    model.hold(VersionId("cold"), 8, 500, PS_PER_S)
    model.advance(3 * PS_PER_S)
    # Fetched at 1 s, active half a second later.
    assert cold.first_ps > PS_PER_S * 3 // 2
    assert cold.first_ps - PS_PER_S * 3 // 2 < PS_PER_S // 10


def test_the_host_pool_evicts_the_least_recently_used_and_never_what_is_in_use() -> None:
    limits = ReplicaLimits(kv_blocks=1000, pool_adapters=2, adapter_slots=2)
    model = ReplicaModel(limits, COST)
    a, b, c = VersionId("a"), VersionId("b"), VersionId("c")
    for version in (a, b):
        model.hold(version, 8, 10, 0)
    running = Sequence(0, 10, 1000, 8, a)
    model.submit(running, 1)
    model.advance(PS_PER_S // 10)
    model.hold(c, 8, 10, PS_PER_S // 10)
    assert model.evicted == [b]
    assert set(model.gate.held) == {a, c}
    assert not model.release(a, PS_PER_S // 10)
    model.advance(100 * PS_PER_S)
    assert running.last_ps > 0
    assert model.release(a, 100 * PS_PER_S)
    assert set(model.gate.held) == {c}


@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens", "at_ps", "said"),
    [(900, 900, 5, "the KV cache holds 1600"), (0, 5, 5, "at least one token"), (5, 5, 3, "past")],
)
def test_what_cannot_be_computed_is_refused(
    prompt_tokens: int, output_tokens: int, at_ps: int, said: str
) -> None:
    model = ReplicaModel(ReplicaLimits(kv_blocks=100), COST)
    model.advance(4)
    with pytest.raises(ValueError, match=said):
        model.submit(Sequence(0, prompt_tokens, output_tokens), at_ps)


def test_who_has_gone_is_held_no_longer() -> None:
    class Owner:
        """Something that a reference can be kept to."""

    model = ReplicaModel(ReplicaLimits(kv_blocks=1 << 20), COST)
    gone: weakref.WeakSet[Owner] = weakref.WeakSet()
    for number in range(500):
        owner = Owner()
        gone.add(owner)
        sequence = Sequence(number, 10, 100_000, owner=owner)
        model.submit(sequence, number * PS_PER_S)
        model.advance(number * PS_PER_S + PS_PER_S // 2)
        assert model.cancel(sequence, number * PS_PER_S + PS_PER_S // 2)
        del owner, sequence
    assert len(gone) < 100


def test_a_report_counts_the_tokens_of_those_that_wait_for_their_adapter() -> None:
    model = ReplicaModel(ReplicaLimits(kv_blocks=100), COST)
    model.submit(Sequence(0, 10, 7, 8, VersionId("cold")), 0)
    model.advance(1)
    assert model.load() == (0, 1, 7, 0.0)
