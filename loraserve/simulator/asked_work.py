"""Work that turns up while other work is done, in processes that each do one piece after the other.

Owns which piece goes to whom; the processes are the simulator's crew.
"""

from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Protocol, TypeVar

from loraserve.simulator.crew import Crew, Work, usable_cores, work_here

Item = TypeVar("Item")
Found = TypeVar("Found")
_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer", contravariant=True)


class Asking(Protocol[_Asked, _Answer]):
    """Who asks for work."""

    @property
    def is_over(self) -> bool:
        """Whether no more is wanted, though something may still be under way."""
        ...

    def take(self) -> _Asked | None:
        """The next item, None while there is none; never None while nothing is under way and it is not
        over."""
        ...

    def tell(self, item: _Asked, found: _Answer) -> None:
        """What came of an item that was taken."""
        ...


def work_as_asked(asking: Asking[Item, Found], work: Work[Item, Found], *, jobs: int | None = None) -> None:
    """Do what is asked for until it is over, at most `jobs` at a time (None: one per core); what is under way
    then is given up.

    One job is done in this process. Failures are as in `work_through`.
    """
    bound = jobs or usable_cores()
    if bound > 1:
        _AskedCrew(asking, work).all_asked(bound)
        return
    number = 0
    while not asking.is_over:
        item = asking.take()
        assert item is not None, "nothing is under way and nothing is asked for"
        asking.tell(item, work_here(number, item, work))
        number += 1


class _AskedCrew(Crew[Item, Found]):
    """The processes of a list that grows."""

    def __init__(self, asking: Asking[Item, Found], work: Work[Item, Found]) -> None:
        self._taken: list[Item] = []
        self._asking, self._hear_done = asking, work.on_done
        self._idle: list[Connection] = []
        super().__init__(self._taken, replace(work, on_done=self._on_done))

    def all_asked(self, bound: int) -> None:
        """Do what is asked for with at most `bound` processes."""
        try:
            while not self._asking.is_over:
                self._hand_out(bound)
                for connection in wait(list(self._children)):
                    self._hear(connection)  # type: ignore[arg-type]
        finally:
            self._end()

    def _hand_out(self, bound: int) -> None:
        while self._idle or len(self._children) < bound:
            item = self._asking.take()
            if item is None:
                break
            self._waiting.append(len(self._taken))
            self._taken.append(item)
            if self._idle:
                self._give(self._idle.pop())
            else:
                self._start()
        assert len(self._idle) < len(self._children), "nothing is under way and nothing is asked for"

    def _give(self, connection: Connection) -> None:
        if self._waiting:
            super()._give(connection)
        else:
            self._idle.append(connection)

    def _on_done(self, place: int, found: Found) -> None:
        self._asking.tell(self._taken[place], found)
        if self._hear_done is not None:
            self._hear_done(place, found)
