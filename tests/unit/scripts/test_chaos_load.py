"""Whether scripts/bench/chaos sees an answer by other weights, and what it takes for a failed run."""

import time
from random import Random
from typing import Any

import pytest
from chaos_account import Bucket, Expected, Kind, Received
from chaos_bench import failures
from chaos_load import Load, Outcome, Request
from chaos_versions import LAG_S, Versions

from loraserve.errors import LoraServeError, OverloadedError, UnavailableError, WorkFailedError
from loraserve.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


class Oracle:
    """Every version says its own name's characters."""

    def expected(self, version: str, prompt: str, sampling: SamplingParams) -> Expected:
        return Expected(token_ids=tuple(map(ord, version)), text=version, finish="length")


def load(versions: Versions) -> Load:
    return Load({}, versions, Oracle(), Random(0))  # type: ignore[arg-type]


def request(sampling: SamplingParams = GREEDY) -> Request:
    return Request(serial=1, mode="proxied", kind="greedy", adapter="a", prompt="hi", sampling=sampling)


def answer(said: str, version: str | None, error: LoraServeError | None = None) -> Outcome:
    """Answered by `version` by the client's account, in the words of the version `said`."""
    finishes = () if error else ("length",)
    received = Received(token_ids=tuple(map(ord, said)), text=said, finishes=finishes)
    return Outcome(received=received, version=version, error=error)


@pytest.mark.parametrize(
    ("outcome", "bucket"),
    [
        (answer("a@1", "a@1"), Bucket.COMPLETED),
        (answer("b@1", "b@1"), Bucket.WRONG_ADAPTER),
        (answer("a@0", "a@0"), Bucket.WRONG_ADAPTER),
        (answer("a@1", None), Bucket.WRONG_ADAPTER),
        # It says that it is the right one, and speaks as another.
        (answer("b@1", "a@1"), Bucket.WRONG_ADAPTER),
        (answer("b@", "a@1", UnavailableError("gone")), Bucket.WRONG_ADAPTER),
        (answer("c@1", "a@1"), Bucket.LOST),
        (answer("a@", "a@1", UnavailableError("gone")), Bucket.ENDED_UNAVAILABLE),
        (answer("", None, OverloadedError("full")), Bucket.REFUSED),
        (answer("", None, WorkFailedError("what?")), Bucket.LOST),
    ],
)
def test_an_answer_by_other_weights_is_seen(outcome: Outcome, bucket: Bucket) -> None:
    found, _ = load(Versions({"a": "a@1", "b": "b@1"}))._judge(request(), outcome, time.monotonic())
    assert found is bucket


def test_what_could_have_gone_on_is_told_from_what_could_not() -> None:
    seen = load(Versions({"a": "a@1"}))
    gone = answer("a@", "a@1", UnavailableError("gone"))
    seen._judge(request(), gone, time.monotonic())
    seen._judge(request(SamplingParams(temperature=1.0, seed=1)), gone, time.monotonic())
    assert seen.unavailable == {"resumable": 1, "not_resumable": 1}


def test_a_version_may_answer_from_its_registration_until_all_have_heard_of_the_next() -> None:
    versions = Versions({"a": "a@1"})
    versions.begin("a", "a@2", 100.0)
    assert versions.may_answer("a", 90.0, 99.0) == {"a@1"}
    assert versions.may_answer("a", 90.0, 100.0) == {"a@1", "a@2"}
    versions.settle("a", "a@2", 110.0)
    assert versions.may_answer("a", 110.0 + LAG_S, 200.0) == {"a@1", "a@2"}
    assert versions.may_answer("a", 110.1 + LAG_S, 200.0) == {"a@2"}
    versions.begin("a", "a@3", 300.0)
    versions.settle("a", "a@2", 310.0)
    assert versions.newest("a") == "a@2"
    assert versions.may_answer("a", 311.0 + LAG_S, 400.0) == {"a@2"}


FOUND: dict[str, Any] = {
    "requests": 3,
    **{bucket.value: 0 for bucket in Bucket},
    "completed": 2,
    "ended_unavailable": 1,
    "ended_unavailable_resumable": 0,
    "not_recovered": [],
    "unsettled": [],
}


def test_a_run_without_a_fault_passes() -> None:
    assert failures(FOUND) == []


@pytest.mark.parametrize(
    "change",
    [
        {"lost": 1, "completed": 1},
        {"duplicated": 1, "completed": 1},
        {"wrong_adapter": 1, "completed": 1},
        {"ended_unavailable_resumable": 1},
        {"requests": 4},
        {"not_recovered": [f"{Kind.ROUTER}"]},
        {"unsettled": ["table versions [1, 2]"]},
    ],
)
def test_every_fault_fails_the_run(change: dict[str, Any]) -> None:
    assert len(failures({**FOUND, **change})) == 1
