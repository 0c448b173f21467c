"""What became of each request, in columns that are filled while the simulation runs."""

from array import array

import numpy as np
from numpy.typing import NDArray

from placement.latency import PS_PER_S
from traces.columns import TraceColumns
from traces.records import Outcome

OUTCOMES = tuple(Outcome)
OK, REFUSED, FAILED = (OUTCOMES.index(one) for one in (Outcome.OK, Outcome.REFUSED, Outcome.FAILED))
OPEN = -1


def _ints(code: str, values: "NDArray[np.int64] | NDArray[np.int32]") -> "array[int]":
    column = array(code)
    column.frombytes(np.ascontiguousarray(values).tobytes())
    return column


class Ledger:
    """One row per request of the trace; `array` and not numpy, whose single values are slow to read.

    A row ends once: as OK by whoever hears its last token, who sets `end_ps`, `first_ps`, `drawn`, `outcome`
    and `num_ended`, or by `close`.
    """

    __slots__ = (
        "adapter",
        "arrival_ps",
        "attempts",
        "drawn",
        "end_ps",
        "first_ps",
        "num_ended",
        "outcome",
        "output",
        "prompt",
        "replica",
        "statuses",
    )

    def __init__(self, trace: TraceColumns) -> None:
        num = len(trace)
        arrival_ps: NDArray[np.int64] = np.rint(trace.arrival_s * PS_PER_S).astype(np.int64)
        self.arrival_ps = arrival_ps
        self.prompt = _ints("i", trace.prompt_tokens.astype(np.int32))
        self.output = _ints("i", trace.output_tokens.astype(np.int32))
        self.adapter = _ints("i", trace.adapter.astype(np.int32))
        self.first_ps = array("q", [-1]) * num
        self.end_ps = array("q", [-1]) * num
        self.drawn = array("i", [0]) * num
        self.replica = array("i", [-1]) * num
        self.attempts = array("h", [0]) * num
        self.outcome = array("b", [OPEN]) * num
        self.num_ended = 0
        self.statuses: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.outcome)

    def close(self, row: int, at_ps: int, outcome: int, status: str) -> None:
        """A request ends without all of its tokens."""
        if self.outcome[row] != OPEN:
            raise AssertionError(f"request {row} ends twice")
        self.outcome[row], self.end_ps[row] = outcome, at_ps
        self.num_ended += 1
        if outcome == FAILED:
            self.statuses[row] = status
