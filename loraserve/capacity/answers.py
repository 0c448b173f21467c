"""What follows from a study: the fewest replicas, the best mix, how sure that is, what it costs.

Values only; everything here is a function of the trials' figures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraserve.capacity.mixes import Mix
from loraserve.capacity.prices import Price
from loraserve.capacity.slo import LATENCY_FIGURES, Target, kind_of
from loraserve.capacity.study import Quest, Study
from loraserve.capacity.trials import TrialFigures

CONFIDENCE = 0.95
ONLY_THIS = "only this mix was asked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """So many replicas with these settings, as tried: the figures of each seed, and whether they hold."""

    policy: str
    what_if: bool
    mix: Mix
    figures: Mapping[int, TrialFigures]
    held: Mapping[int, bool]
    used: float

    @property
    def replicas(self) -> int:
        """How many there are."""
        return len(self.mix)

    @property
    def num_held(self) -> int:
        """With how many seeds it held."""
        return sum(self.held.values())

    @property
    def holds(self) -> bool:
        """Whether it held with every seed."""
        return all(self.held.values())

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output tokens, the mean over seeds that were not given up."""
        rates = [found.tokens_per_s for found in self.figures.values() if found.gave_up_ms is None]
        return sum(rates) / len(rates) if rates else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """The same of output tokens."""
        rates = [found.output_tokens_per_s for found in self.figures.values() if found.gave_up_ms is None]
        return sum(rates) / len(rates) if rates else 0.0

    def worst(self, figure: str) -> float | None:
        """The figure with the seed where it is worst; infinite where a run was given up for it."""
        values = [found.figures.get(figure) for found in self.figures.values() if found.gave_up_ms is None]
        known = [value for value in values if value is not None]
        if any(found.gave_up_ms is not None for found in self.figures.values()) and figure in LATENCY_FIGURES:
            return math.inf
        if not known:
            return None
        return max(known) if figure in LATENCY_FIGURES else min(known)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The fewest replicas at a target with the bounds on one kind of latency times `factor`; None: not even
    `tried` hold, and 0 if no number does."""

    kind: str
    factor: float
    target: Target
    replicas: int | None
    tried: int
    per_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one policy needs. `best` is the fewest replicas that hold, with the mix that leaves most of every
    bound unused; None if not even `most` hold, and `nearest` then came nearest to it. `notes` are
    sentences."""

    policy: str
    what_if: bool
    best: Candidate | None
    nearest: Candidate | None
    lower_bound: int
    proof: str
    notes: tuple[str, ...]
    curve: tuple[CurvePoint, ...] = ()
    per_hour: float | None = None
    per_million_tokens: float | None = None
    per_million_output_tokens: float | None = None

    @property
    def replicas(self) -> int | None:
        """How many, None if none held."""
        return None if self.best is None else self.best.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Everything that was found: an answer for each policy, without and with the what-if; `candidates` in
    the order of their policies, and of replicas."""

    target: Target
    seeds: tuple[int, ...]
    answers: tuple[Answer, ...]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    what_if: tuple[str, ...] = ()
    has_mixes: bool = False
    price: Price | None = None
    num_trials: int = 0
    workload: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Answer:
        """The answer as things are that needs fewest, among equals the one with most to spare."""
        today = [answer for answer in self.answers if not answer.what_if]
        return min(today, key=_rank)

    @property
    def all_found(self) -> bool:
        """Whether some policy holds, as things are and, if that was asked, with the what-if."""
        kinds = {answer.what_if for answer in self.answers}
        found = {answer.what_if for answer in self.answers if answer.best is not None}
        return kinds == found


def share_sure(num_held: int, num_seeds: int) -> float:
    """The lowest share of seeds that may hold, with CONFIDENCE, if all of so many did (Clopper and Pearson);
    0 if not all did, of which we say no more than how many."""
    return (1 - CONFIDENCE) ** (1 / num_seeds) if num_held == num_seeds else 0.0


def candidates_of(study: Study, quest: Quest) -> list[Candidate]:
    """What was tried for a quest's question, by replicas, judged at the quest's target."""
    question = quest.question
    wanted: dict[int, set[Mix]] = {}
    for one in study.quests:
        if one.question is question:
            for number in one.asked:
                wanted.setdefault(number, set()).update(study.mixes_wanted(one, number))
    made = []
    for number in sorted(wanted):
        for mix in (mix for mix in question.mixes.of(number) if mix in wanted[number]):
            trials = study.trials(question, mix)
            found = {trial.seed: study.found[trial] for trial in trials}
            used = [
                math.inf if one.gave_up_ms is not None else quest.target.used(one.figures)
                for one in found.values()
            ]
            made.append(
                Candidate(
                    policy=question.contender.name,
                    what_if=bool(question.what_if),
                    mix=mix,
                    figures=found,
                    held={trial.seed: bool(study.held(quest, trial)) for trial in trials},
                    used=max(used),
                )
            )
    return made


def answer_of(study: Study, quest: Quest, curve: Sequence[CurvePoint], price: Price | None) -> Answer:
    """The answer to a quest's question, with what was found at looser and tighter targets."""
    tried = candidates_of(study, quest)
    fewest = quest.fewest
    best = min((one for one in tried if one.replicas == fewest and one.holds), key=_spare, default=None)
    nearest = min(tried, key=lambda one: (-one.num_held, one.used, one.replicas), default=None)
    answer = Answer(
        policy=quest.question.contender.name,
        what_if=bool(quest.question.what_if),
        best=best,
        nearest=nearest,
        lower_bound=quest.question.start,
        proof=_proof(quest, tried, fewest),
        notes=(*_impossible(quest), *_partial(tried, fewest), *_not_monotone(tried, fewest)),
        curve=tuple(curve),
    )
    return _priced(answer, price)


def _spare(one: Candidate) -> tuple[float, Mix]:
    return one.used, one.mix


def _rank(answer: Answer) -> tuple[float, float]:
    if answer.best is None:
        return math.inf, 0.0 if answer.nearest is None else answer.nearest.used
    return answer.best.replicas, answer.best.used


def _priced(answer: Answer, price: Price | None) -> Answer:
    best = answer.best
    if price is None or best is None:
        return answer
    return replace(
        answer,
        per_hour=price.per_hour(best.replicas),
        per_million_tokens=price.per_million_tokens(best.replicas, best.tokens_per_s),
        per_million_output_tokens=price.per_million_tokens(best.replicas, best.output_tokens_per_s),
    )


def point_of(quest: Quest, kind: str, factor: float, price: Price | None) -> CurvePoint:
    """What a quest found at a target with this kind of latency times a factor."""
    fewest = quest.fewest
    return CurvePoint(
        kind=kind,
        factor=factor,
        target=quest.target,
        replicas=fewest,
        tried=max(quest.asked, default=0),
        per_hour=None if price is None or fewest is None else price.per_hour(fewest),
    )


def _proof(quest: Quest, tried: Sequence[Candidate], fewest: int | None) -> str:
    """Why fewer do not do, if more hold whenever fewer do."""
    if quest.question.mixes.exactly is not None:
        return ONLY_THIS
    if fewest is None:
        return ""
    if fewest <= 1:
        return "fewer there are none"
    below = [one for one in tried if one.replicas == fewest - 1]
    if not below:
        return f"{fewest - 1} cannot lose what is to be lost"
    most = max(one.num_held for one in below)
    return f"{fewest - 1} hold with {most} of {len(below[0].held)} seeds"


def _impossible(quest: Quest) -> list[str]:
    clause = quest.impossible
    if clause is None:
        return []
    floor_ms = quest.question.floors_ms[kind_of(clause.figure)]
    return [f"no number of replicas holds {clause.text}: one step takes {floor_ms:g} ms"]


def _partial(tried: Sequence[Candidate], fewest: int | None) -> list[str]:
    lines = []
    for number in sorted({one.replicas for one in tried if fewest is None or one.replicas < fewest}):
        best = max(one.num_held for one in tried if one.replicas == number)
        total = len(tried[0].held)
        if 0 < best < total:
            lines.append(f"{_replicas(number)} hold with {best} of {total} seeds")
    return lines


def _not_monotone(tried: Sequence[Candidate], fewest: int | None) -> list[str]:
    """What contradicts that more replicas hold whenever fewer do."""
    if fewest is None:
        return []
    holds = {one.replicas: False for one in tried}
    for one in tried:
        holds[one.replicas] |= one.holds
    fewer = [number for number, held in holds.items() if held and number < fewest]
    more = [number for number, held in holds.items() if not held and number > fewest]
    lines = [f"not monotone: {_replicas(number)} held too, though {fewest - 1} did not" for number in fewer]
    return lines + [f"not monotone: {_replicas(number)} did not hold, though {fewest} did" for number in more]


def _replicas(number: int) -> str:
    return "1 replica" if number == 1 else f"{number} replicas"
