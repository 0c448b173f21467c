"""Work that turns up while other work is done: in any number of processes, none of which is left."""

import multiprocessing
import time
from dataclasses import dataclass, field
from functools import partial

import pytest

from loraserve.errors import BadInputError, WorkFailedError
from loraserve.simulator.asked_work import work_as_asked
from loraserve.simulator.crew import Tell, Work

ENDLESS_S = 1000.0


def doubled(number: int, tell: Tell) -> int:
    tell(number)
    return 2 * number


def slow_above(limit: int, number: int, tell: Tell) -> int:
    if number > limit:
        time.sleep(ENDLESS_S)
    return number


def refuses(number: int, tell: Tell) -> int:
    raise BadInputError("no such number")


@dataclass
class UpTo:
    """Asks for the doubles of 1, 2, 4, ... one after the other until `end`, and for others meanwhile."""

    end: int
    extra: list[int] = field(default_factory=list)
    wanted: int | None = 1
    found: list[tuple[int, int]] = field(default_factory=list)
    reached: int = 1

    @property
    def is_over(self) -> bool:
        return self.reached >= self.end

    def take(self) -> int | None:
        if self.wanted is not None:
            taken, self.wanted = self.wanted, None
            return taken
        return self.extra.pop() if self.extra else None

    def tell(self, item: int, found: int) -> None:
        self.found.append((item, found))
        if item == self.reached:
            self.reached = self.wanted = 2 * item


def work(act: "partial[int] | None" = None) -> Work[int, int]:
    return Work(act=act or doubled, label=name_of)


def name_of(number: int) -> str:
    return f"number {number}"


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_each_answer_may_ask_for_more(jobs: int) -> None:
    heard: list[int] = []
    asking = UpTo(end=64)
    told = Work(act=doubled, label=name_of, on_progress=lambda _, number: heard.append(number))
    work_as_asked(asking, told, jobs=jobs)
    assert asking.found == [(number, 2 * number) for number in (1, 2, 4, 8, 16, 32)]
    assert heard == [1, 2, 4, 8, 16, 32]
    assert multiprocessing.active_children() == []


def test_what_nobody_waits_for_is_given_up_at_the_end() -> None:
    asking = UpTo(end=8, extra=[101])
    work_as_asked(asking, work(partial(slow_above, 100)), jobs=2)
    assert asking.found == [(1, 1), (2, 2), (4, 4)]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_ends_all_of_it(jobs: int) -> None:
    with pytest.raises(BadInputError, match="no such number"):
        work_as_asked(UpTo(end=8, extra=[5]), Work(act=refuses, label=name_of), jobs=jobs)
    assert multiprocessing.active_children() == []


def dies(number: int, tell: Tell) -> int:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_dies_is_one_line() -> None:
    with pytest.raises(WorkFailedError, match="number 1: its process died"):
        work_as_asked(UpTo(end=8), Work(act=dies, label=name_of), jobs=2)
    assert multiprocessing.active_children() == []
