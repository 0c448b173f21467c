"""From what a user asks for to what was found: reads, checks, searches, answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from loraserve.capacity.answers import Answer, Found, answer_of, candidates_of, point_of
from loraserve.capacity.mixes import Asked, Mixes, lowest_setting
from loraserve.capacity.prices import Price
from loraserve.capacity.slo import LATENCIES, Target
from loraserve.capacity.study import Quest, Question, Study, Told
from loraserve.capacity.trials import Setting, Trial, TrialFigures, label_of, run_trial, scenario_of_trial
from loraserve.errors import BadInputError
from loraserve.experiments.contenders import Contender
from loraserve.simulator.asked_work import work_as_asked
from loraserve.simulator.crew import Work, usable_cores
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.what_if import WhatIf
from placement.latency import PS_PER_MS, RankKernel
from placement.steady_load import SteadyLoad, steady_tokens_per_s

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The targets of a curve of cost against the SLO, of the one given."""
CURVE_REACH = 4
"""A tighter target is given up at so many times the replicas that the one given needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityOptions:
    """What is asked: the fewest of up to `most` replicas that hold `target` with every seed, of each
    contender, as things are and, where `what_if` is not empty, with it too. With `has_curve` also at looser
    and tighter targets."""

    setting: Setting
    target: Target
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    most: int = 64
    asked: Asked = field(default_factory=Asked)
    what_if: WhatIf = field(default_factory=WhatIf)
    price: Price | None = None
    has_curve: bool = False
    jobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What is searched: every question, and what is to be said before."""

    options: CapacityOptions
    setting: Setting
    questions: tuple[Question, ...]
    has_mixes: bool
    notes: tuple[str, ...]
    first: Scenario


def prepare(options: CapacityOptions) -> Problem:
    """Read and check everything before anything is simulated; BadInputError says what is wrong."""
    setting = _judged(options)
    whats = (WhatIf(), options.what_if) if options.what_if else (WhatIf(),)
    first = _one_replica(options, setting, whats[0], options.seeds[0])
    is_padded = first.replicas[0].cost.kernel is RankKernel.PADDED_CONFIG
    notes = []
    if not is_padded and options.asked != Asked():
        kernel = first.replicas[0].cost.kernel.value
        notes.append(
            f"--max-lora-ranks: with kernel {kernel} rank does not cost by the engine's setting, so a mix"
            " changes nothing; every replica takes every rank"
        )
    if is_padded and options.asked == Asked() and not setting.profile.operating_points:
        notes.append(
            f"profile {setting.profile.name} has no operating points to propose mixes by; every replica has"
            " the same max_lora_rank"
        )
    questions = []
    for what_if in whats:
        scenarios = tuple(_one_replica(options, setting, what_if, seed) for seed in options.seeds)
        _check_warmup(options, scenarios)
        mixes = _mixes(options, setting, scenarios, is_padded, what_if)
        start = max(_fluid(setting, scenario, mixes) for scenario in scenarios)
        least = 1 + (what_if.lose.num_replicas if what_if.lose is not None else 0)
        _check_time_of_loss(what_if, least, scenarios)
        questions += [
            Question(
                contender=one,
                what_if=what_if,
                mixes=mixes,
                start=min(start, options.most),
                least=least,
                floors_ms=_floors_ms(scenarios[0]),
            )
            for one in options.contenders
        ]
        if least > options.most:
            raise BadInputError(f"--lose: {least - 1}; expected fewer than --most, {options.most}")
    return Problem(
        options=options,
        setting=setting,
        questions=tuple(questions),
        has_mixes=is_padded,
        notes=tuple(notes),
        first=first,
    )


def solve(
    problem: Problem,
    on_told: Callable[[Told], None] | None = None,
    on_going: Callable[[Trial, int, int], None] | None = None,
) -> Found:
    """Search, and say what was found; `on_told` hears of every trial that was asked for, `on_going` how many
    requests of one under way have come, of how many.

    The same whatever `jobs` is. WorkFailedError if a process dies.
    """
    options = problem.options
    base = tuple(
        Quest(question, options.target, most=options.most, is_first=True) for question in problem.questions
    )
    jobs = options.jobs or usable_cores()
    study = Study(
        base,
        options.seeds,
        ahead=jobs > 1,
        on_told=on_told,
        then=partial(_curves, options) if options.has_curve else None,
    )
    work: Work[Trial, TrialFigures] = Work(
        act=partial(run_trial, problem.setting),
        label=label_of,
        on_progress=None if on_going is None else lambda _, going: on_going(*going),
    )
    work_as_asked(study, work, jobs=jobs)
    answers = tuple(_answer(study, quest, options.price) for quest in base)
    return Found(
        target=options.target,
        seeds=options.seeds,
        answers=answers,
        candidates=tuple(one for quest in base for one in candidates_of(study, quest)),
        notes=problem.notes,
        what_if=options.what_if.describe(),
        has_mixes=problem.has_mixes,
        price=options.price,
        num_trials=len(study.found),
        workload={name.replace("_", " "): _plain(value) for name, value in problem.first.describe().items()},
    )


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    return f"{value:,.10g}" if isinstance(value, float) else str(value)


def _curves(options: CapacityOptions, study: Study) -> tuple[Quest, ...]:
    """The same questions at looser and tighter targets, from what was found on."""
    made: list[Quest] = []
    for quest in study.quests:
        if quest.fewest is None or quest.question.mixes.exactly:
            continue
        most = min(options.most, CURVE_REACH * quest.fewest)
        made += [
            Quest(quest.question, quest.target.scaled(kind, factor), most=most, start=quest.fewest)
            for kind in quest.target.latency_kinds
            for factor in FACTORS
        ]
    return tuple(made)


def _answer(study: Study, quest: Quest, price: Price | None) -> Answer:
    curve = [one for one in study.quests if one is not quest and one.question is quest.question]
    named = [(kind, factor) for kind in quest.target.latency_kinds for factor in FACTORS]
    points = [point_of(one, kind, factor, price) for one, (kind, factor) in zip(curve, named, strict=False)]
    return answer_of(study, quest, points, price)


def _judged(options: CapacityOptions) -> Setting:
    """With what attainment counts by, and with when a run is hopeless for every target of the curve."""
    setting = options.setting
    hopeless = options.target.hopeless_ttft_ms
    if hopeless is not None and options.has_curve:
        hopeless *= max(FACTORS)
    judging = replace(setting.judging, slo=options.target.judged_by)
    return replace(setting, judging=judging, give_up_ttft_ms=hopeless)


def _one_replica(options: CapacityOptions, setting: Setting, what_if: WhatIf, seed: int) -> Scenario:
    """The workload on one replica, to check and to count by."""
    without_loss = replace(what_if, lose=None)
    trial = Trial(
        contender=options.contenders[0],
        what_if=without_loss,
        mix=(setting.profile.engine.max_lora_rank,),
        seed=seed,
    )
    return scenario_of_trial(setting, trial)


def _mixes(
    options: CapacityOptions,
    setting: Setting,
    scenarios: Sequence[Scenario],
    is_padded: bool,
    what_if: WhatIf,
) -> Mixes:
    highest = setting.profile.engine.max_lora_rank
    if not is_padded:
        return Mixes(uniform=highest)
    ranks = [adapter.rank for scenario in scenarios for adapter in scenario.adapters]
    asked = options.asked
    given = (asked.rank,) if asked.rank is not None else asked.mix
    if given is not None:
        _check_given(given, ranks, highest, options)
    if asked.mix is not None:
        return Mixes(uniform=max(asked.mix), exactly=asked.mix)
    if asked.rank is not None:
        return Mixes(uniform=asked.rank)
    can_propose = bool(setting.profile.operating_points)
    return Mixes(
        uniform=lowest_setting(ranks, highest),
        scenarios=tuple(scenarios) if can_propose else (),
        num_lost=0 if what_if.lose is None else what_if.lose.num_replicas,
    )


def _check_given(
    given: tuple[int, ...], ranks: Sequence[int], highest: int, options: CapacityOptions
) -> None:
    needed = max(ranks, default=1)
    if max(given) < needed:
        raise BadInputError(
            f"--max-lora-ranks: {max(given)} at most; expected at least {needed}, the highest rank of an"
            " adapter"
        )
    if max(given) > highest:
        raise BadInputError(
            f"--max-lora-ranks: {max(given)}; expected at most {highest}, what the profile's engine takes"
        )
    if len(given) > options.most:
        raise BadInputError(
            f"--max-lora-ranks: {len(given)} replicas; expected at most --most, {options.most}"
        )


def _check_warmup(options: CapacityOptions, scenarios: Sequence[Scenario]) -> None:
    warmup_s = options.setting.judging.warmup_s
    last_s = min(float(scenario.trace.arrival_s[-1]) for scenario in scenarios)
    if last_s < warmup_s:
        raise BadInputError(
            f"--warmup: {warmup_s:g} s leaves nothing, the last request comes at {last_s:g} s"
        )


def _check_time_of_loss(what_if: WhatIf, least: int, scenarios: Sequence[Scenario]) -> None:
    for scenario in scenarios:
        what_if.failures(least, scenario.trace.duration_s)


def _floors_ms(scenario: Scenario) -> dict[str, float]:
    """What no latency is below: one step without anything in it."""
    base_ms = min(setup.cost.base for setup in scenario.replicas) / PS_PER_MS
    has_gaps = int(scenario.trace.output_tokens.max()) > 1
    return dict.fromkeys(LATENCIES if has_gaps else ("ttft", "e2e"), base_ms)


def _fluid(setting: Setting, scenario: Scenario, mixes: Mixes) -> int:
    """How many replicas would be busy all the time with this workload if ranks never met in a batch, by
    operating points, or where there are none by the latency model."""
    (known,) = scenario.profiles.values()
    trace, latency = scenario.trace, known.latency
    assert latency is not None, "it is simulated by it"
    is_uniform = latency.kernel is RankKernel.PADDED_CONFIG and not mixes.scenarios
    ranks = [mixes.uniform if is_uniform else adapter.rank for adapter in scenario.adapters]
    tokens = trace.prompt_tokens.astype(np.int64) + trace.output_tokens
    load = SteadyLoad(
        rows=known.engine.max_num_seqs,
        prompt_tokens=float(trace.prompt_tokens.mean()),
        output_tokens=float(trace.output_tokens.mean()),
    )

    def speed(rank: int) -> float:
        if known.operating_points:
            return known.operating_point(rank)
        return steady_tokens_per_s(replace(latency, max_lora_rank=max(rank, 1)), load, rank)

    speeds = np.array([*(speed(rank) for rank in ranks), speed(0)])
    busy_s = float((tokens / speeds[trace.adapter]).sum())
    if trace.duration_s <= 0:
        return 1
    return max(1, math.ceil(busy_s / trace.duration_s))
