"""What to put where a trace format says nothing: lengths, and the things that a seed decides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from traces.columns import TraceColumns
from traces.formats.base import MAX_TOKENS
from traces.types import TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """Used by the formats that leave something open, and by no others.

    Lengths are fixed (`prompt_tokens` and `output_tokens`, both) or drawn as pairs, by the seed, from
    another workload (`lengths_from`). With `unknown` they stay 0, which says that they are not known.
    `spread` places the invocations of a minute (Azure Functions 2019); `popularity` is a `.npy` file of
    adapters' shares (Toppings).
    """

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    lengths_from: TraceColumns | None = None
    unknown: bool = False
    seed: int = 0
    spread: Literal["random", "even"] = "random"
    popularity: Path | None = None

    def __post_init__(self) -> None:
        for what, value in (("prompt", self.prompt_tokens), ("output", self.output_tokens)):
            if value is not None and not 1 <= value <= MAX_TOKENS:
                raise TraceError(f"{value} {what} tokens are not possible; it must be 1 to {MAX_TOKENS:,}")
        if self.lengths_from is not None and not len(self.lengths_from):
            raise TraceError("the workload to take lengths from has no requests")
        if self.spread not in ("random", "even"):
            raise TraceError(f"no spread is called {self.spread!r}; there are: random, even")
        if not 0 <= self.seed < 1 << 63:
            raise TraceError(f"a seed of {self.seed} is not possible; it must be from 0 to 2^63 - 1")

    def check_lengths(self, format: str, source: str) -> None:
        """Refuse a format without lengths if there is nothing to put there."""
        fixed = (self.prompt_tokens is not None, self.output_tokens is not None)
        if self.unknown or self.lengths_from is not None or all(fixed):
            return
        what = (
            f"{format} tells no numbers of tokens; give both --prompt-tokens and --output-tokens, or "
            "--lengths-from ANOTHER_TRACE (`loraserve trace convert` has these options and writes a trace "
            "with lengths)"
        )
        raise TraceError(what, source=source)

    def lengths(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Prompt and output tokens of so many requests."""
        if self.lengths_from is not None:
            # Of random() alone: the stream of every other method may change from one numpy to the next.
            places = (np.random.default_rng([self.seed, 1]).random(count) * len(self.lengths_from)).astype(
                np.int64
            )
            return self.lengths_from.prompt_tokens[places], self.lengths_from.output_tokens[places]
        return (
            np.full(count, self.prompt_tokens or 0, dtype=np.int32),
            np.full(count, self.output_tokens or 0, dtype=np.int32),
        )


UNKNOWN = Fill(unknown=True)
"""Lengths may be missing: for looking at a trace, not for serving it."""
