"""A workload as columns: a million requests in a few numpy arrays.

The simulator's input and the synthesiser's output; `traces.types.Trace` is the same row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.types import BadRow

BASE = -1
"""The place that stands for the base model in the column `adapter`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceAdapter:
    """An adapter that a workload names; `rank` None is unknown."""

    name: str
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceColumns:
    """n requests in order of arrival, the first at 0 s.

    `arrival_s` is float64; `prompt_tokens`, `output_tokens` and `adapter` are int32, the last a place in
    `adapters` or `BASE`. Where the trace names its prompts' blocks, request i has
    `hash_ids[hash_offsets[i]:hash_offsets[i + 1]]` (int64 both), one per `hash_block_tokens` tokens.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    adapter: NDArray[np.int32]
    adapters: tuple[TraceAdapter, ...]
    source: str
    format: str
    hash_offsets: NDArray[np.int64] | None = None
    hash_ids: NDArray[np.int64] | None = None
    hash_block_tokens: int = 512
    bad_rows: Sequence[BadRow] = ()
    num_bad_rows: int = 0

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1]) if len(self) else 0.0
