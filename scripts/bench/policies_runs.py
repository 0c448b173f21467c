"""Runs cases side by side in processes, and finds the highest rate inside the SLO for each contender."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from policies_cases import Case, Outcome, run_case, with_rate

from loraserve.profiling.search import RateSearch, SearchLimits

TOLERANCE = 0.02
START = 0.8
"""Of the fluid rate, where a search begins."""
LOWEST, HIGHEST = 0.05, 1.5

Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Highest:
    """The end of one search: the highest rate that was inside the SLO (0: none), the lowest that was not
    (0: none), and every run on the way."""

    case: Case
    held_per_s: float
    failed_per_s: float
    probes: tuple[Outcome, ...]


def search(case: Case) -> Highest:
    """Bracket and bisect the highest rate of this contender; `case.rate_per_s` is the fluid rate."""
    fluid = case.rate_per_s
    limits = SearchLimits(lowest=LOWEST * fluid, highest=HIGHEST * fluid, tolerance=TOLERANCE)
    rates = RateSearch(limits, START * fluid)
    probes = []
    while (rate := rates.next_rate) is not None:
        probes.append(run_case(with_rate(case, rate)))
        rates.tell(held=probes[-1].in_slo)
    return Highest(
        case=case, held_per_s=rates.held or 0.0, failed_per_s=rates.failed or 0.0, probes=tuple(probes)
    )


class Runner:
    """Processes that simulate; `jobs` None is one per core, 1 none at all."""

    def __init__(self, pool: ProcessPoolExecutor | None, note: Callable[[str], None]) -> None:
        self._pool = pool
        self._note = note

    def all(self, what: str, act: Callable[[Given], Found], cases: Sequence[Given]) -> list[Found]:
        """What comes of every case, in their order."""
        if self._pool is None:
            return [self._noted(what, done, len(cases), act(case)) for done, case in enumerate(cases, 1)]
        places = {self._pool.submit(act, case): place for place, case in enumerate(cases)}
        found: dict[int, Found] = {}
        for future in as_completed(places):
            found[places[future]] = self._noted(what, len(found) + 1, len(cases), future.result())
        return [found[place] for place in range(len(cases))]

    def _noted(self, what: str, done: int, total: int, value: Found) -> Found:
        if done == total or done % 10 == 0:
            self._note(f"{what}: {done} of {total}")
        return value


@contextmanager
def runner(jobs: int | None, note: Callable[[str], None]) -> Iterator[Runner]:
    """Processes for simulations, ended whatever happens."""
    bound = jobs or len(os.sched_getaffinity(0))
    if bound == 1:
        yield Runner(None, note)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(bound, mp_context=context, initializer=_ignore_interrupts)
    try:
        yield Runner(pool, note)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole group of processes; the parent ends the others in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
