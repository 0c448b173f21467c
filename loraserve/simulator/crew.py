"""A crew of processes that work through a list: each takes one piece after the other.

Owns the processes: none outlives the call, whether it ends, fails or is interrupted.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from loraserve.errors import BadInputError, LoraServeError, WorkFailedError

END_TIMEOUT_S = 5.0
"""How long a process is waited for before it is killed."""

Item = TypeVar("Item")
Found = TypeVar("Found")
Tell = Callable[[Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Generic[Item, Found]):
    """What is to be done: `act` is a function of a module (it travels to other processes) that is given an
    item and a function to tell of its progress with; `label` is what a person calls an item. `on_progress`
    hears an item's place and what its act told, `on_done` its place and what came of it, as they end.
    """

    act: Callable[[Item, Tell], Found]
    label: Callable[[Item], str]
    on_progress: Callable[[int, Any], None] | None = None
    on_done: Callable[[int, Found], None] | None = None


def work_through(
    items: Sequence[Item], work: Work[Item, Found], *, jobs: int | None = None
) -> tuple[Found, ...]:
    """Do them all, at most `jobs` at a time (None: one per core), and give what came of each in their order.

    One job, or one item, is done in this process. The first failure ends all others and is raised, with its
    item's label; a process that dies is a WorkFailedError with its exit code.
    """
    bound = min(jobs or usable_cores(), len(items))
    if bound <= 1:
        return tuple(work_here(place, item, work) for place, item in enumerate(items))
    return Crew(items, work).all(bound)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def work_here(place: int, item: Item, work: Work[Item, Found]) -> Found:
    """Do one item in this process."""
    found = work.act(item, lambda told: work.on_progress(place, told) if work.on_progress else None)
    if work.on_done is not None:
        work.on_done(place, found)
    return found


@dataclass(slots=True, kw_only=True, eq=False)
class _Child:
    process: SpawnProcess
    place: int


class Crew(Generic[Item, Found]):
    """The processes of one list."""

    def __init__(self, items: Sequence[Item], work: Work[Item, Found]) -> None:
        self._items, self._work = items, work
        self._waiting = deque(range(len(items)))
        self._children: dict[Connection, _Child] = {}
        self._found: dict[int, Found] = {}

    def all(self, bound: int) -> tuple[Found, ...]:
        """Do everything with `bound` processes."""
        try:
            for _ in range(bound):
                self._start()
            while self._children:
                for connection in wait(list(self._children)):
                    self._hear(connection)  # type: ignore[arg-type]
        finally:
            self._end()
        return tuple(self._found[place] for place in range(len(self._items)))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, self._work.act, self._work.label), daemon=True)
        try:
            with _interrupts_held():
                process.start()
                # Before a signal that was held back can be raised, or nobody would end it.
                self._children[ours] = _Child(process=process, place=-1)
        finally:
            # With our copy open, the end of the process would not end the pipe.
            theirs.close()
        self._give(ours)

    def _give(self, connection: Connection) -> None:
        """The next item to this process, or its end."""
        if not self._waiting:
            self._forget(connection)
            return
        child = self._children[connection]
        child.place = self._waiting.popleft()
        try:
            connection.send(self._items[child.place])
        except OSError:
            self._died(child)

    def _hear(self, connection: Connection) -> None:
        child = self._children[connection]
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            self._died(child)
        if kind == "progress":
            if self._work.on_progress is not None:
                self._work.on_progress(child.place, value)
        elif kind == "found":
            self._found[child.place] = value
            if self._work.on_done is not None:
                self._work.on_done(child.place, value)
            self._give(connection)
        else:
            raise value

    def _died(self, child: _Child) -> None:
        child.process.join(END_TIMEOUT_S)
        label = self._work.label(self._items[child.place])
        raise WorkFailedError(f"{label}: its process died ({_exit_of(child.process)})") from None

    def _forget(self, connection: Connection) -> None:
        child = self._children.pop(connection)
        connection.close()
        child.process.join(END_TIMEOUT_S)
        _kill(child.process)

    def _end(self) -> None:
        for child in self._children.values():
            child.process.terminate()
        for connection in list(self._children):
            self._forget(connection)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back, and let processes that start meanwhile be born with SIGINT blocked.

    A process that is interrupted before it runs our code, or handed half of its work, would tell of it.
    """
    # It unblocks SIGINT when it starts.
    resource_tracker.ensure_running()
    held: list[int] = []
    # Other threads of this process, such as those of numpy, take signals too: a mask is not enough.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, lambda came, _frame: held.append(came)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for came in held:
            signal.raise_signal(came)


def _exit_of(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is None:
        return "still ending"
    return f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill(process: SpawnProcess) -> None:
    if process.is_alive():
        process.kill()
        process.join()


def _child(connection: Connection, act: Callable[[Any, Tell], Any], label: Callable[[Any], str]) -> None:
    """The life of one process: take an item, do it, tell, until there is none."""
    # Ctrl-C reaches the whole group of processes; the parent ends this one in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            connection.send(_answer(connection.recv(), act, label, connection))
        except (EOFError, OSError):
            # The parent is gone, or has no more to do.
            return


class _Gone(BaseException):
    """Nobody is left to tell."""


def _tell(connection: Connection, told: Any) -> None:
    try:
        connection.send(("progress", told))
    except OSError:
        raise _Gone from None


def _answer(
    item: Any, act: Callable[[Any, Tell], Any], label: Callable[[Any], str], connection: Connection
) -> tuple[str, Any]:
    try:
        return "found", act(item, lambda told: _tell(connection, told))
    except _Gone:
        raise EOFError from None
    except LoraServeError as error:
        kind = BadInputError if isinstance(error, BadInputError) else WorkFailedError
        # An act may have said already what it was about.
        name, line = label(item), str(error)
        return "error", kind(line if line.startswith(name) else f"{name}: {line}")
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return "error", WorkFailedError(f"{label(item)}: {line}")
