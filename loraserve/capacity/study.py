"""Which trials are run, and in what order: searches over the number of replicas that share their trials.

Pure but for what it is told. What is asked for depends on figures alone, never on how many processes there
are or which of them ends first; what is only tried ahead is dropped if nobody asks for it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from loraserve.capacity.mixes import Mix, Mixes
from loraserve.capacity.slo import Target
from loraserve.capacity.trials import Trial, TrialFigures
from loraserve.experiments.contenders import Contender
from loraserve.experiments.fewest import ReplicaSearch
from loraserve.simulator.what_if import WhatIf

LOOKAHEAD = 3
"""How many answers ahead are guessed while a process has nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """How many replicas does this policy need for this workload? `start` is where to begin to look; fewer
    than `least` replicas hold nothing, and are not tried. No latency of a kind is ever below its floor."""

    contender: Contender
    what_if: WhatIf
    mixes: Mixes
    start: int
    least: int = 1
    floors_ms: Mapping[str, float] = field(default_factory=dict)


class Quest:
    """One question at one target: finds the fewest replicas by asking for numbers of them.

    It begins at `start`, by default where the question says. With `is_first`, the number above the answer is
    asked for too, whether more do hold as well, and all mixes of the answer are compared.
    """

    def __init__(
        self,
        question: Question,
        target: Target,
        *,
        most: int,
        start: int | None = None,
        is_first: bool = False,
    ) -> None:
        self.question = question
        self.target = target
        self.asked: list[int] = []
        """What was asked for and answered, in this order."""
        self._most = most
        self._is_first = is_first
        self.is_comparing = False
        """Whether it has its answer, and mixes of it are still to be tried."""
        self._is_pinned = question.mixes.exactly is not None
        self.impossible = target.below(question.floors_ms)
        """The bound that no number of replicas holds, if there is one; nothing is asked for then."""
        exactly = question.mixes.exactly
        start = max(start or question.start, question.least) if exactly is None else len(exactly)
        self._pinned = start
        self._search = ReplicaSearch(most=max(most, start), start=start)

    @property
    def fewest(self) -> int | None:
        """The answer so far."""
        if self._is_pinned:
            return self._pinned if self._search.fewest == self._pinned else None
        return self._search.fewest

    @property
    def is_over(self) -> bool:
        """Whether it wants to know nothing more."""
        return self.next_replicas() is None and not self.is_comparing

    def compares(self, number: int) -> bool:
        """Whether all mixes of so many replicas are to be tried."""
        return self._is_first and self._search.next_replicas is None and number == self.fewest

    def next_replicas(self) -> int | None:
        """What it wants to know now, None when it knows all."""
        if self.impossible is not None:
            return None
        if self._is_pinned:
            return None if self.asked else self._pinned
        if self._search.next_replicas is not None:
            return self._search.next_replicas
        above = None if self.fewest is None else self.fewest + 1
        is_wanted = self._is_first and above is not None and above <= self._most
        return above if is_wanted and above not in self.asked else None

    def advance(self, judge: Callable[[int], bool | None]) -> None:
        """Go on as far as `judge` knows whether numbers of replicas hold."""
        while (number := self.next_replicas()) is not None:
            held = False if number < self.question.least else judge(number)
            if held is None:
                return
            if number >= self.question.least:
                self.asked.append(number)
            if self._search.next_replicas is not None:
                self._search.tell(held=held)
                self.is_comparing = self.compares(self.fewest or 0)

    def ahead(self, lean: Callable[[int], bool | None]) -> Iterator[int]:
        """What it may want to know next, the likeliest first; `lean` says how a number is known to end."""
        if self._is_pinned or self.impossible is not None or self._search.next_replicas is None:
            return
        searches = [self._search]
        for _ in range(LOOKAHEAD):
            later = []
            for search in searches:
                number = search.next_replicas
                assert number is not None
                known = lean(number)
                for held in (False, True) if known is None else (known,):
                    guess = copy.copy(search)
                    guess.tell(held=held)
                    if guess.next_replicas is not None:
                        later.append(guess)
                        yield guess.next_replicas
            searches = later


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A trial that ended, and whether it held the first target of its question."""

    trial: Trial
    figures: TrialFigures
    held: bool


class Study:
    """All quests over one store of trials; an `Asking` for `asked.work_as_asked`.

    `on_told` hears of each trial that was asked for, once; `ahead` lets idle processes try what may be asked
    for next. When all quests have their answers, `then` may give more of them, once.
    """

    def __init__(
        self,
        quests: tuple[Quest, ...],
        seeds: tuple[int, ...],
        *,
        ahead: bool = False,
        on_told: Callable[[Told], None] | None = None,
        then: Callable[["Study"], tuple[Quest, ...]] | None = None,
    ) -> None:
        self.quests = quests
        self._then = then
        self._seeds = seeds
        self._ahead = ahead
        self._on_told = on_told
        self._found: dict[Trial, TrialFigures] = {}
        self._taken: set[Trial] = set()
        self._announced: set[Trial] = set()
        self._advance()

    @property
    def found(self) -> Mapping[Trial, TrialFigures]:
        """Everything that is known."""
        return self._found

    @property
    def is_over(self) -> bool:
        """Whether every quest has its answer."""
        return all(quest.is_over for quest in self.quests)

    def trials(self, question: Question, mix: Mix) -> tuple[Trial, ...]:
        """A mix of a question, with each seed."""
        return tuple(
            Trial(contender=question.contender, what_if=question.what_if, mix=mix, seed=seed)
            for seed in self._seeds
        )

    def take(self) -> Trial | None:
        """The next trial that somebody waits for, else one that somebody may."""
        wanted = chain(self._required(), self._guessed() if self._ahead else ())
        for trial in wanted:
            if trial not in self._taken:
                self._taken.add(trial)
                return trial
        return None

    def tell(self, item: Trial, found: TrialFigures) -> None:
        """What came of it."""
        self._found[item] = found
        self._announce()
        self._advance()
        self._announce()

    def held(self, quest: Quest, trial: Trial) -> bool | None:
        """Whether a trial held a quest's target, None if it is not known."""
        found = self._found.get(trial)
        if found is None:
            return None
        return found.gave_up_ms is None and quest.target.holds(found.figures)

    def judge(self, quest: Quest, number: int) -> bool | None:
        """Whether some mix of so many replicas held with every seed; None until that is known."""
        for mix in quest.question.mixes.of(number):
            verdicts = [self.held(quest, trial) for trial in self.trials(quest.question, mix)]
            if None in verdicts:
                return None
            if all(verdicts):
                return True
        return False

    def mixes_wanted(self, quest: Quest, number: int) -> Iterator[Mix]:
        """The mixes that a quest wants to know of so many replicas: one after the other until one holds, and
        all of them where they are to be compared."""
        for mix in quest.question.mixes.of(number):
            yield mix
            if not quest.compares(number):
                verdicts = [self.held(quest, trial) for trial in self.trials(quest.question, mix)]
                if None in verdicts or all(verdicts):
                    return

    def _lean(self, quest: Quest, number: int) -> bool | None:
        """How a number is certain to end by what is known already."""
        mixes = [
            [self.held(quest, trial) for trial in self.trials(quest.question, mix)]
            for mix in quest.question.mixes.of(number)
        ]
        if any(all(of_mix) for of_mix in mixes):
            return True
        return False if all(False in of_mix for of_mix in mixes) else None

    def _advance(self) -> None:
        self._advance_quests()
        if self._then is not None and self.is_over:
            self.quests, self._then = (*self.quests, *self._then(self)), None
            self._advance_quests()

    def _advance_quests(self) -> None:
        for quest in self.quests:
            quest.advance(partial(self.judge, quest))
            if quest.is_comparing and all(
                trial in self._found for trial in self._of(quest, quest.fewest or 0)
            ):
                quest.is_comparing = False

    def _required(self) -> Iterator[Trial]:
        for quest in self.quests:
            number = quest.next_replicas()
            if number is not None:
                yield from self._wanted(quest, number)
        for quest in self.quests:
            if quest.is_comparing:
                yield from self._wanted(quest, quest.fewest or 0)

    def _wanted(self, quest: Quest, number: int) -> Iterator[Trial]:
        if number >= quest.question.least:
            for mix in self.mixes_wanted(quest, number):
                yield from self.trials(quest.question, mix)

    def _guessed(self) -> Iterator[Trial]:
        for quest in self.quests:
            number = quest.next_replicas()
            if number is not None:
                yield from self._of(quest, number)
            for number in quest.ahead(partial(self._lean, quest)):
                yield from self._of(quest, number)

    def _of(self, quest: Quest, number: int) -> Iterator[Trial]:
        if number >= quest.question.least:
            for mix in quest.question.mixes.of(number):
                yield from self.trials(quest.question, mix)

    def _announce(self) -> None:
        """Tell of what is both wanted and known, so that guesses that nobody came back to are not shown."""
        if self._on_told is None:
            return
        for quest in self.quests:
            wanted = quest.next_replicas()
            for number in (*quest.asked, *(() if wanted is None else (wanted,))):
                for trial in self._wanted(quest, number):
                    if trial in self._found and trial not in self._announced:
                        self._announced.add(trial)
                        held = self.held(self._first(quest), trial)
                        self._on_told(Told(trial=trial, figures=self._found[trial], held=bool(held)))

    def _first(self, quest: Quest) -> Quest:
        """The quest that the question was asked for; others vary its target."""
        return next(one for one in self.quests if one.question is quest.question)
