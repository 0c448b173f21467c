"""Capacity from the simulator: as every number tried by itself, with mixes, what-ifs and prices."""

from dataclasses import replace
from functools import lru_cache

import pytest

from loraserve.capacity.answers import Found
from loraserve.capacity.mixes import Asked
from loraserve.capacity.prices import Price
from loraserve.capacity.slo import FIGURES, Target
from loraserve.capacity.solve import CapacityOptions, prepare, solve
from loraserve.capacity.tree import tree_of
from loraserve.capacity.trials import Setting, Trial, run_trial
from loraserve.capacity.words import answer_lines, none_line
from loraserve.errors import BadInputError
from loraserve.experiments.contenders import contenders
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.figures import Judging
from loraserve.simulator.from_profile import ClusterOptions
from loraserve.simulator.what_if import WhatIf
from loraserve.simulator.workload import SimulatedWorkload

SETTING = Setting(
    workload=SimulatedWorkload(
        source="preset:loraserve-skew",
        rate_per_s=20.0,
        duration_s=16.0,
        adapters=10,
        ranks="8,16,32,64,128",
    ),
    profile=find_simulatable("a100-llama2-7b-bgmv-42"),
    cluster=ClusterOptions(epoch_s=10.0),
    judging=Judging(),
)
OPTIONS = CapacityOptions(
    setting=SETTING,
    target=Target.parse("ttft_p95<1s,tbt_p95<100ms"),
    contenders=contenders(["optimal"]),
    seeds=(0, 1),
    most=12,
    jobs=1,
)
PADDED = replace(
    OPTIONS,
    setting=replace(
        SETTING,
        workload=replace(
            SETTING.workload, source="preset:loraserve-uniform", rate_per_s=40.0, ranks="8,16,128"
        ),
        cluster=replace(SETTING.cluster, kernel="padded_config"),
    ),
)


@lru_cache(maxsize=8)
def found_by(options: CapacityOptions) -> Found:
    return solve(prepare(options))


@pytest.mark.parametrize("slo", ["ttft_p95<1s,tbt_p95<100ms", "ttft_p99<400ms,attainment>0.97"])
def test_the_answer_is_that_of_trying_every_number(slo: str) -> None:
    options = replace(OPTIONS, target=Target.parse(slo))
    answer = found_by(options).best
    judged = replace(SETTING, judging=Judging(slo=options.target.judged_by))

    def holds(number: int) -> bool:
        trials = [
            Trial(contender=options.contenders[0], what_if=WhatIf(), mix=(128,) * number, seed=seed)
            for seed in options.seeds
        ]
        runs = [run_trial(judged, trial, lambda _: None) for trial in trials]
        return all(options.target.holds(run.figures) for run in runs)

    assert answer.replicas is not None
    assert answer.replicas > 2
    held = [holds(number) for number in range(2, answer.replicas + 2)]
    assert held == [False] * (answer.replicas - 2) + [True, True]


def test_the_same_is_found_in_one_process_and_in_three() -> None:
    assert tree_of(solve(prepare(replace(OPTIONS, jobs=3)))) == tree_of(found_by(OPTIONS))


def test_a_mix_holds_with_fewer_than_one_setting_for_all() -> None:
    mixed = found_by(PADDED).best
    uniform = found_by(replace(PADDED, asked=Asked(rank=128))).best
    assert mixed.best is not None
    assert uniform.best is not None
    assert mixed.best.replicas < uniform.best.replicas
    assert len(set(mixed.best.mix)) > 1
    assert set(uniform.best.mix) == {128}


def test_a_mix_asked_for_is_tried_as_it_is() -> None:
    best = found_by(PADDED).best.best
    assert best is not None
    again = found_by(replace(PADDED, asked=Asked(mix=best.mix)))
    assert again.best.best == best
    assert again.best.proof == "only this mix was asked for"
    assert len(again.candidates) == 1
    weak = found_by(replace(PADDED, asked=Asked(mix=(8, 8, 16, 16, 16, 128))))
    assert not weak.all_found
    line = none_line(weak, weak.best, 12)
    assert line.startswith("optimal: 2 x 8, 3 x 16, 1 x 128 do not hold ttft_p95<1s,tbt_p95<100ms; they do")


def test_a_profile_without_operating_points_proposes_nothing_and_says_so() -> None:
    profile = replace(SETTING.profile, operating_points=(), mixed_tokens_per_s=None)
    found = found_by(replace(PADDED, setting=replace(PADDED.setting, profile=profile), most=2))
    assert "has no operating points to propose mixes by" in found.notes[0]
    assert {len(set(one.mix)) for one in found.candidates} == {1}
    assert found.best.lower_bound == 2


def test_other_kernels_say_that_a_mix_changes_nothing() -> None:
    found = found_by(replace(OPTIONS, asked=Asked(mix=(16, 128))))
    assert found.notes == (
        "--max-lora-ranks: with kernel padded_batch rank does not cost by the engine's setting, so a mix"
        " changes nothing; every replica takes every rank",
    )
    assert found.best.replicas == found_by(OPTIONS).best.replicas


def test_more_traffic_more_adapters_and_a_loss_need_no_fewer() -> None:
    what_if = WhatIf.parse(add=["20x128@0.5"], lose="1@20%")
    found = found_by(replace(OPTIONS, what_if=what_if))
    now, then = found.answers
    assert (now.what_if, then.what_if) == (False, True)
    assert now == found_by(OPTIONS).best
    assert now.replicas is not None
    assert then.replicas is not None
    assert then.replicas > now.replicas
    assert answer_lines(found)[-1] == (
        f"optimal: {now.replicas} replicas as things are; with 20 more adapters of rank 128, together with"
        " 50 % of the requests there are, on top; 1 replica lost for good, 20 % of the way into the trace:"
        f" {then.replicas} replicas"
    )


def test_tighter_targets_cost_no_less_and_every_number_is_simulated_once_a_seed() -> None:
    found = found_by(replace(OPTIONS, has_curve=True, price=Price(per_gpu_hour=2.5)))
    (answer,) = found.answers
    assert answer.per_hour == 2.5 * (answer.replicas or 0)
    for kind in ("ttft", "tbt"):
        curve = [point for point in answer.curve if point.kind == kind]
        assert [point.factor for point in curve] == [0.25, 0.5, 1.0, 2.0, 4.0]
        numbers = [point.replicas or 1000 for point in curve]
        assert numbers == sorted(numbers, reverse=True)
        assert curve[2].replicas == answer.replicas
        for point in curve:
            assert point.per_hour == (None if point.replicas is None else 2.5 * point.replicas)
    # A step takes longer than a quarter of the bound on TBT.
    quarter = next(point for point in answer.curve if (point.kind, point.factor) == ("tbt", 0.25))
    assert (quarter.replicas, quarter.tried) == (None, 0)
    replicas = [one.replicas for one in found.candidates]
    assert len(replicas) == len(set(replicas))


def test_policies_are_answered_side_by_side_and_the_best_is_named() -> None:
    found = found_by(replace(OPTIONS, contenders=contenders(["least-loaded", "optimal"])))
    assert [answer.policy for answer in found.answers] == ["least-loaded", "optimal"]
    fewest = min(answer.replicas or 1000 for answer in found.answers)
    assert found.best.replicas == fewest


def test_where_not_even_the_most_hold_the_nearest_is_told() -> None:
    found = found_by(replace(OPTIONS, most=2))
    assert not found.all_found
    assert found.best.nearest is not None
    tree = tree_of(found)
    assert tree["best"]["replicas"] is None
    assert tree["best"]["nearest"]["by_seed"][0]["gave_up_ttft_p95_above_ms"] == 1000.0


def test_figures_of_a_trial_have_every_name() -> None:
    trial = Trial(contender=OPTIONS.contenders[0], what_if=WhatIf(), mix=(128,) * 6, seed=0)
    heard: list[tuple[Trial, int, int]] = []
    run = run_trial(SETTING, trial, heard.append)
    assert tuple(run.figures) == FIGURES
    assert heard[-1] == (trial, run.requests, run.requests)
    assert run.failed == 0
    assert 0 < run.output_tokens_per_s < run.tokens_per_s


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (replace(PADDED, asked=Asked(rank=64)), "--max-lora-ranks: 64 at most; expected at least 128"),
        (replace(PADDED, asked=Asked(rank=256)), "--max-lora-ranks: 256; expected at most 128"),
        (replace(PADDED, asked=Asked(mix=(128,) * 13)), "--max-lora-ranks: 13 replicas; expected at most"),
        (replace(OPTIONS, what_if=WhatIf.parse(lose="12")), "--lose: 12; expected fewer than --most, 12"),
        (replace(OPTIONS, what_if=WhatIf.parse(scale=["nobody=2"])), "--scale: 'nobody' has no requests"),
        (replace(OPTIONS, what_if=WhatIf.parse(lose="1@900s")), "--lose: at 900 s"),
        (
            replace(OPTIONS, setting=replace(SETTING, judging=Judging(warmup_s=900.0))),
            "--warmup: 900 s leaves nothing",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_simulated(
    options: CapacityOptions, line: str
) -> None:
    with pytest.raises(BadInputError, match=line):
        prepare(options)
