"""The pure batching model conserves sequences and KV tokens and always makes progress."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.config import EmulatedSection
from loraserve.engines.batching import Batch, BatchLimits, Sequence, Step, step_time_s

LIMITS = st.builds(
    BatchLimits,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(1, 40),
    kv_capacity_tokens=st.just(64),
)
REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24)), min_size=1, max_size=20)


def sequence(name: str, prompt_tokens: int, rank: int = 0) -> Sequence:
    return Sequence(request_id=name, prompt_tokens=prompt_tokens, rank=rank)


def run_step(batch: Batch, limits: BatchLimits, wanted: dict[str, int]) -> Step:
    step = batch.schedule()
    batch.check_invariants()
    assert sum(chunk.num_tokens for chunk in step.chunks) <= limits.max_num_batched_tokens
    assert len({id(chunk.sequence) for chunk in step.chunks}) == len(step.chunks) <= limits.max_num_seqs
    assert all(chunk.num_tokens > 0 for chunk in step.chunks)
    for one in batch.commit(step):
        batch.check_invariants()
        if one.output_tokens == wanted[one.request_id]:
            assert batch.remove(one.request_id)
    batch.check_invariants()
    return step


@given(limits=LIMITS, requests=REQUESTS)
def test_every_sequence_draws_all_its_tokens_and_leaves_nothing(
    limits: BatchLimits, requests: list[tuple[int, int]]
) -> None:
    batch = Batch(limits)
    wanted = {}
    for index, (prompt_tokens, output_tokens) in enumerate(requests):
        batch.add(sequence(str(index), prompt_tokens))
        wanted[str(index)] = output_tokens
    steps = 0
    while len(batch):
        assert run_step(batch, limits, wanted).chunks, "a step that computes nothing would never end"
        steps += 1
        assert steps < 100_000
    assert (batch.num_running, batch.num_waiting, batch.kv_usage) == (0, 0, 0)


@settings(max_examples=200)
@given(limits=LIMITS, data=st.data())
def test_random_arrivals_and_removals_conserve_everything(limits: BatchLimits, data: st.DataObject) -> None:
    batch = Batch(limits)
    wanted: dict[str, int] = {}
    for index in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["add", "step", "remove", "remove mid-step"])):
            case "add":
                batch.add(sequence(str(index), data.draw(st.integers(1, 40))))
                wanted[str(index)] = data.draw(st.integers(1, 24))
            case "step":
                run_step(batch, limits, wanted)
            case "remove":
                batch.remove(data.draw(st.sampled_from([*wanted, "nobody"])))
            case _:
                step = batch.schedule()
                gone = data.draw(st.sampled_from([*wanted, "nobody"]))
                batch.remove(gone)
                drawn = {one.request_id for one in batch.commit(step)}
                assert gone not in drawn
                for name in drawn:
                    batch.remove(name)
        batch.check_invariants()


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    batch = Batch(BatchLimits(max_num_seqs=4, max_num_batched_tokens=16, kv_capacity_tokens=100))
    batch.add(sequence("long", 40))
    sizes = []
    for _ in range(3):
        step = batch.schedule()
        sizes.append(step.prefill_tokens)
        drawn = batch.commit(step)
    assert sizes == [16, 16, 8]
    assert [one.request_id for one in drawn] == ["long"]


def test_decoding_goes_on_while_a_prompt_is_prefilled() -> None:
    batch = Batch(BatchLimits(max_num_seqs=4, max_num_batched_tokens=16, kv_capacity_tokens=100))
    batch.add(sequence("first", 4))
    batch.commit(batch.schedule())
    batch.add(sequence("second", 40))
    step = batch.schedule()
    assert [(chunk.sequence.request_id, chunk.num_tokens) for chunk in step.chunks] == [
        ("first", 1),
        ("second", 15),
    ]


def test_a_full_cache_preempts_the_sequence_admitted_last_and_it_recomputes() -> None:
    batch = Batch(BatchLimits(max_num_seqs=4, max_num_batched_tokens=64, kv_capacity_tokens=10))
    batch.add(sequence("old", 5))
    batch.add(sequence("new", 5))
    batch.commit(batch.schedule())
    assert batch.kv_usage == 1.0
    step = batch.schedule()
    assert [chunk.sequence.request_id for chunk in step.chunks] == ["old"]
    assert (batch.num_running, batch.num_waiting) == (1, 1)
    batch.commit(step)
    batch.remove("old")
    recompute = batch.schedule()
    assert recompute.prefill_tokens == 6, "the prompt and the token already drawn"
    batch.check_invariants()


def test_the_step_time_is_the_documented_formula() -> None:
    model = EmulatedSection(
        base_step_ms=10, prefill_token_ms=1, decode_seq_ms=2, rank_seq_ms=0.5, load_bytes_per_s=1, speed=2
    )
    batch = Batch(BatchLimits(max_num_seqs=4, max_num_batched_tokens=64, kv_capacity_tokens=100))
    batch.add(sequence("a", 3, rank=8))
    batch.add(sequence("b", 4, rank=16))
    step = batch.schedule()
    assert step_time_s(step, model) == pytest.approx((10 + 7 * 1 + 2 * 2 + 2 * 0.5 * 16) / 1000 / 2)


def test_an_id_can_be_in_the_batch_only_once() -> None:
    batch = Batch(BatchLimits(max_num_seqs=1, max_num_batched_tokens=1, kv_capacity_tokens=1))
    batch.add(sequence("a", 1))
    with pytest.raises(ValueError, match="already"):
        batch.add(sequence("a", 1))
