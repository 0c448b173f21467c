"""What scripts/bench/chaos makes of an answer, and how it plans its kills."""

from pathlib import Path

import chaos_account as account
import pytest
from chaos_account import Bucket, Kind
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "chaos_account.py"


WHOLE = account.Expected(token_ids=tuple(range(100, 120)), text="a text of twenty tok", finish="length")


def received(
    *token_ids: int, text: str | None = None, finishes: tuple[str, ...] = ("length",)
) -> account.Received:
    """An answer whose text goes with its tokens, a character each."""
    text = WHOLE.text[: len(token_ids)] if text is None else text
    return account.Received(token_ids=token_ids, text=text, finishes=finishes)


@pytest.mark.parametrize(
    ("answer", "bucket", "says"),
    [
        (received(*range(100, 120)), Bucket.COMPLETED, ""),
        (received(*range(100, 119)), Bucket.LOST, "the last 1 of 20"),
        (received(*range(100, 110), *range(105, 120)), Bucket.DUPLICATED, "says again"),
        (received(*range(100, 120), *range(100, 120)), Bucket.DUPLICATED, "says again"),
        (received(*range(100, 110), *range(112, 120)), Bucket.LOST, "missing after token 10"),
        (received(*range(100, 110), *range(10)), Bucket.LOST, "another text"),
        (received(*range(100, 120), 7), Bucket.LOST, "another text"),
        (received(*range(100, 120), text="a text of twenty to?"), Bucket.LOST, "at character 19"),
        (received(*range(100, 120), finishes=("length", "length")), Bucket.DUPLICATED, "ended 2 times"),
        (received(*range(100, 120), finishes=("stop",)), Bucket.LOST, "not length"),
        (received(*range(100, 120), finishes=()), Bucket.LOST, "not length"),
    ],
)
def test_only_the_whole_right_answer_is_complete(answer: account.Received, bucket: Bucket, says: str) -> None:
    found, note = account.judge_whole(WHOLE, answer)
    assert found is bucket
    assert says in note
    assert bool(note) == (bucket is not Bucket.COMPLETED)


@given(st.integers(0, 20))
def test_what_ended_early_is_right_only_as_a_beginning(num_tokens: int) -> None:
    part = received(*WHOLE.token_ids[:num_tokens], finishes=())
    assert account.judge_part(WHOLE, part) == (Bucket.ENDED_UNAVAILABLE, "")
    other = received(*WHOLE.token_ids[:num_tokens], 7, finishes=())
    assert account.judge_part(WHOLE, other)[0] is Bucket.LOST


@given(num_kills=st.integers(1, 300), links=st.booleans(), seed=st.integers(0, 3))
def test_a_plan_has_as_many_kills_as_asked_for_and_each_kind_its_share(
    num_kills: int, links: bool, seed: int
) -> None:
    plan = account.plan_kills(num_kills, links=links, seed=seed)
    assert len(plan) == num_kills
    assert plan == account.plan_kills(num_kills, links=links, seed=seed)
    kinds = [kind for kind in Kind if links or kind is not Kind.LINK]
    total = sum(account.WEIGHTS[kind] for kind in kinds)
    for kind in Kind:
        share = num_kills * account.WEIGHTS[kind] / total if kind in kinds else 0
        assert abs(plan.count(kind) - share) < 1


def test_every_request_is_in_one_bucket() -> None:
    tally = account.Tally()
    for bucket in Bucket:
        tally.begin()
        tally.end(bucket)
    tally.begin()
    tally.check()
    assert tally.open == 1
    tally.buckets[Bucket.LOST] += 1
    with pytest.raises(AssertionError, match="7 issued"):
        tally.check()


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(
    values: list[float], share: float
) -> None:
    found = account.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)
    assert account.percentile([], share) is None
