"""What outlives the controller of the demand it knew: the forecaster's state and the last windows.

Each window has a key of its own and is written once; the state is written anew with each epoch. Nothing rests
on a write: one that fails is made up for by the next.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from loraserve.controller.store import Store
from loraserve.errors import WorkFailedError
from placement.types import ReplicaId, VersionId

logger = logging.getLogger(__name__)

Rates = Mapping[VersionId, float]
Part = tuple[float, dict[VersionId, int]]
"""The seconds of an epoch, and the tokens served in it."""

_STATE, _WINDOW = "state", "window/"


@dataclass(slots=True)
class Life:
    """A replica's process, by its incarnation, and its last report that was taken in: its number, and the
    tokens by version that were counted until then."""

    replica_id: ReplicaId
    incarnation: str
    sequence: int
    tokens: Mapping[VersionId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The forecaster's state as it exported it, the epochs of the next window that are over, the last
    windows, the newest last; and as of the end of the last epoch what each life of a replica had counted,
    and the time by the machine's monotonic clock."""

    forecaster: Mapping[str, Any]
    parts: tuple[Part, ...]
    windows: tuple[Rates, ...] = ()
    lives: tuple[Life, ...] = ()
    ended_s: float = float("inf")


class DemandMemory:
    """Keeps the last `num_windows` windows in the store; `load` once, then `save` with each epoch."""

    def __init__(self, store: Store, num_windows: int) -> None:
        self._store = store
        self._num_windows = num_windows
        self._kept: set[str] = set()
        self._next = 0
        self._unsaved: deque[tuple[int, str]] = deque(maxlen=num_windows)
        self._has_failed = False

    def load(self) -> Remembered | None:
        """What the controller before has saved; None, with a line in the log, if it cannot be read."""
        texts = self._store.demand()
        self._kept = set(texts)
        if not texts:
            return None
        try:
            return self._read(texts)
        except (msgspec.DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("the demand that was saved cannot be read, it is measured anew: %s", error)
            return None

    def _read(self, texts: Mapping[str, str]) -> Remembered:
        state = msgspec.json.decode(texts[_STATE])
        numbers = sorted(int(key.removeprefix(_WINDOW)) for key in texts if key != _STATE)
        windows = [msgspec.json.decode(texts[_key(number)]) for number in numbers]
        remembered = Remembered(
            forecaster=dict(state["forecaster"]),
            parts=tuple(
                (float(seconds), {VersionId(one): int(served) for one, served in part.items()})
                for seconds, part in state["parts"]
            ),
            windows=tuple(
                {VersionId(one): float(rate) for one, rate in window.items()} for window in windows
            ),
            lives=tuple(msgspec.convert(state.get("lives", []), list[Life])),
            ended_s=float(state.get("ended_s", "inf")),
        )
        self._next = numbers[-1] + 1 if numbers else 0
        return remembered

    def save(self, known: Remembered, window: Rates) -> None:
        """An epoch has ended with this window; the windows before it are kept already."""
        self._unsaved.append((self._next, _text(window)))
        self._next += 1
        windows = {_key(number): text for number, text in self._unsaved}
        wanted = {_key(number) for number in range(self._next - self._num_windows, self._next)}
        gone = dict.fromkeys(self._kept - wanted - {_STATE})
        state = _text(
            {
                "forecaster": known.forecaster,
                "parts": known.parts,
                "lives": known.lives,
                "ended_s": known.ended_s,
            }
        )
        try:
            self._store.save_demand({_STATE: state, **windows, **gone})
        except WorkFailedError as error:
            if not self._has_failed:
                logger.warning("demand is not saved: %s", error)
            self._has_failed = True
            return
        self._has_failed = False
        self._kept = (self._kept & wanted) | windows.keys()
        self._unsaved.clear()


def _key(number: int) -> str:
    return f"{_WINDOW}{number}"


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
