"""The search asks for what it needs, whatever order answers come in, and finds what trying all would find."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.capacity.answers import answer_of, candidates_of, share_sure
from loraserve.capacity.mixes import Mix, Mixes
from loraserve.capacity.prices import Price
from loraserve.capacity.slo import Target
from loraserve.capacity.study import Quest, Question, Study, Told
from loraserve.capacity.trials import Trial, TrialFigures
from loraserve.experiments.contenders import CONTENDERS
from loraserve.simulator.what_if import WhatIf

TARGET = Target.parse("ttft_p95<1s")
SEEDS = (0, 1, 2)
MOST = 20


def question(*, start: int = 1, least: int = 1, mixes: Mixes | None = None) -> Question:
    return Question(
        contender=CONTENDERS[0],
        what_if=WhatIf(),
        mixes=mixes or Mixes(uniform=64),
        start=start,
        least=least,
    )


def figures(ttft_ms: float) -> TrialFigures:
    return TrialFigures(figures={"ttft_p95": ttft_ms}, tokens_per_s=1000.0, output_tokens_per_s=250.0)


class Many(Mixes):
    """Two mixes of every number: a better one and a worse one."""

    def of(self, num_replicas: int) -> tuple[Mix, ...]:
        return (16,) * num_replicas, (64,) * num_replicas


def run(study: Study, ttft_ms: dict[tuple[int, int, int], float], order: list[int]) -> list[Trial]:
    """Answer as `order` says: several under way at a time, ended in any order. Gives what was taken."""
    under_way: list[Trial] = []
    taken = []
    picks = iter(order)
    while not study.is_over:
        trial = study.take()
        if trial is not None:
            under_way.append(trial)
            taken.append(trial)
        if trial is None or len(under_way) == 3:
            done = under_way.pop(next(picks, 0) % len(under_way))
            study.tell(done, figures(ttft_ms[done.num_replicas, done.mix[0], done.seed]))
    return taken


def needing(thresholds: dict[int, list[int]]) -> dict[tuple[int, int, int], float]:
    """Runs that hold from so many replicas on, by their mixes' rank and their seeds."""
    return {
        (number, rank, seed): 500.0 if number >= need else 2000.0
        for rank, needs in thresholds.items()
        for seed, need in zip(SEEDS, needs, strict=True)
        for number in range(1, MOST + 2)
    }


NEEDS = st.lists(st.integers(1, MOST + 1), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(NEEDS, NEEDS, st.integers(1, MOST), st.booleans(), st.lists(st.integers(0, 9), max_size=40))
def test_the_fewest_is_that_of_trying_every_number(
    cheap: list[int], dear: list[int], start: int, ahead: bool, order: list[int]
) -> None:
    quest = Quest(question(start=start, mixes=Many(uniform=64)), TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS, ahead=ahead)
    run(study, needing({16: cheap, 64: dear}), order)
    fewest = min(max(cheap), max(dear))
    assert quest.fewest == (fewest if fewest <= MOST else None)
    if quest.fewest is not None and fewest > 1:
        below = [one for one in candidates_of(study, quest) if one.replicas == fewest - 1]
        assert len(below) == 2
        assert not any(one.holds for one in below)


@settings(max_examples=40, deadline=None)
@given(NEEDS, NEEDS, st.integers(1, MOST), st.lists(st.integers(0, 9), max_size=40))
def test_what_is_shown_does_not_depend_on_who_ends_first(
    cheap: list[int], dear: list[int], start: int, order: list[int]
) -> None:
    shown = []
    for ahead, picks in ((False, []), (True, order)):
        told: list[Told] = []
        quest = Quest(question(start=start, mixes=Many(uniform=64)), TARGET, most=MOST, is_first=True)
        study = Study((quest,), SEEDS, ahead=ahead, on_told=told.append)
        run(study, needing({16: cheap, 64: dear}), picks)
        tried = candidates_of(study, quest)
        shown.append((answer_of(study, quest, (), None), tried, {one.trial for one in told}))
        assert len(told) == len({one.trial for one in told}) == len(SEEDS) * len(tried)
    assert shown[0] == shown[1]


def test_one_more_is_tried_and_every_mix_of_the_answer() -> None:
    quest = Quest(question(start=2, mixes=Many(uniform=64)), TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS)
    ttft_ms = needing({16: [3, 3, 3], 64: [3, 4, 3]}) | {(3, 64, 0): 100.0, (3, 64, 2): 100.0}
    run(study, ttft_ms, [])
    tried = [(one.replicas, one.mix[0], one.num_held) for one in candidates_of(study, quest)]
    assert tried == [(2, 16, 0), (2, 64, 0), (3, 16, 3), (3, 64, 2), (4, 16, 3)]
    answer = answer_of(study, quest, (), Price(per_gpu_hour=2.5, gpus_per_replica=4))
    assert answer.best is not None
    assert (answer.replicas, answer.best.mix, answer.proof) == (3, (16,) * 3, "2 hold with 0 of 3 seeds")
    assert answer.per_hour == 30.0
    assert answer.per_million_tokens == 30.0 / 3.6
    assert answer.per_million_output_tokens == 120.0 / 3.6


def test_of_mixes_that_hold_the_one_with_most_to_spare_is_best() -> None:
    quest = Quest(question(mixes=Many(uniform=64)), TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS)
    run(study, needing({16: [2, 2, 2], 64: [2, 2, 2]}) | {(2, 64, seed): 400.0 for seed in SEEDS}, [])
    best = answer_of(study, quest, (), None).best
    assert best is not None
    assert (best.mix, best.used, best.worst("ttft_p95")) == ((64, 64), 0.4, 400.0)


def test_numbers_that_hold_with_some_seeds_are_named() -> None:
    quest = Quest(question(), TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS)
    run(study, needing({64: [5, 4, 4]}), [])
    answer = answer_of(study, quest, (), None)
    assert answer.replicas == 5
    assert answer.notes == ("4 replicas hold with 2 of 3 seeds",)
    assert answer.proof == "4 hold with 2 of 3 seeds"


def test_what_is_not_monotone_is_said() -> None:
    ttft_ms = needing({64: [3, 3, 3]}) | {(4, 64, 1): 5000.0}
    quest = Quest(question(start=3), TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS)
    run(study, ttft_ms, [])
    assert answer_of(study, quest, (), None).notes == ("not monotone: 4 replicas did not hold, though 3 did",)


def test_with_nothing_that_holds_the_nearest_is_known() -> None:
    quest = Quest(question(), TARGET, most=4, is_first=True)
    study = Study((quest,), SEEDS)
    run(study, needing({64: [4, 9, 9]}), [])
    answer = answer_of(study, quest, (), None)
    assert (quest.fewest, answer.best, answer.replicas) == (None, None, None)
    assert answer.nearest is not None
    assert (answer.nearest.replicas, answer.nearest.num_held) == (4, 1)


def test_fewer_than_what_is_lost_are_not_tried() -> None:
    quest = Quest(question(start=1, least=3), TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS)
    run(study, needing({64: [1, 1, 1]}), [])
    assert quest.fewest == 3
    assert quest.asked == [3, 4]
    assert answer_of(study, quest, (), None).proof == "2 cannot lose what is to be lost"


def test_a_mix_that_was_asked_for_is_tried_alone() -> None:
    mixes = Mixes(uniform=64, exactly=(16, 16, 64))
    for needs, fewest in (([3, 2, 1], 3), ([3, 4, 1], None)):
        quest = Quest(question(mixes=mixes), TARGET, most=MOST, is_first=True)
        study = Study((quest,), SEEDS)
        run(study, needing({16: needs}), [])
        assert (quest.asked, quest.fewest) == ([3], fewest)


def test_quests_share_trials_and_follow_up_once() -> None:
    first = Quest(question(), TARGET, most=MOST, is_first=True)

    def more(study: Study) -> tuple[Quest, ...]:
        assert first.fewest == 4
        return tuple(
            Quest(first.question, TARGET.scaled("ttft", factor), most=8, start=first.fewest)
            for factor in (0.25, 1.0, 4.0)
        )

    study = Study((first,), SEEDS, then=more)
    taken = run(study, needing({64: [4, 4, 4]}), [])
    assert len(taken) == len(set(taken))
    assert [quest.fewest for quest in study.quests] == [4, None, 4, 1]
    assert max(study.quests[1].asked) == 8


def test_a_bound_below_one_step_is_not_searched() -> None:
    impossible = replace(question(), floors_ms={"ttft": 1500.0})
    quest = Quest(impossible, TARGET, most=MOST, is_first=True)
    study = Study((quest,), SEEDS)
    assert study.is_over
    assert study.take() is None
    notes = answer_of(study, quest, (), None).notes
    assert notes == ("no number of replicas holds ttft_p95<1s: one step takes 1500 ms",)


def test_a_run_that_was_given_up_holds_nothing() -> None:
    quest = Quest(question(), TARGET, most=1, is_first=True)
    study = Study((quest,), (0,))
    trial = study.take()
    assert trial is not None
    study.tell(trial, TrialFigures(figures={}, gave_up_ms=4000.0))
    (one,) = candidates_of(study, quest)
    endless = float("inf")
    assert (one.holds, one.used, one.worst("ttft_p95"), one.tokens_per_s) == (False, endless, endless, 0.0)


def test_seeds_that_all_hold_say_how_many_would_at_least() -> None:
    assert share_sure(3, 3) ** 3 == pytest.approx(0.05)
    assert share_sure(2, 3) == 0.0


def test_price_of_nothing_served_is_none() -> None:
    assert Price(per_gpu_hour=2.0).per_million_tokens(3, 0.0) is None
