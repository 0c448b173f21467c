"""How fast a replica works: what routers estimate a request's time from.

Knows no engine and no task; the server tells it what happens to each request, and of the queue
whenever it reports.
"""

from typing import NamedTuple

from loraserve.clock import Clock
from loraserve.replica.ranks import RankCounts
from loraserve.request import Prompt, num_prompt_tokens

MIN_SAMPLE_S = 0.05
"""Reports may go to several routers; the counts are folded in at most so often."""

MIN_MEMORY_S = 3.0
MAX_MEMORY_S = 60.0
MEMORY_OUTPUTS = 2.0
"""What happened so many outputs ago counts for 1/e of what happens now. Requests that started
together end together, so starts come in waves as long as an output takes."""

PRIOR_S = 0.5
"""How much measuring the guess is worth that stands in for the rate of starts at first."""

MAX_SLOWDOWN = 8.0
"""A gap counts as at most so many times the mean: one reader that stops for a minute says nothing
about the engine."""

OUTPUTS_REMEMBERED = 64


class Rates(NamedTuple):
    """What `loraserve.rpc.table_codec.LoadReport` says of speed; 0 where nothing is known."""

    starts_per_s: float
    token_s: float
    output_tokens: float
    prompt_tokens: float = 0.0


class Meter:
    """Folds what happens into decaying sums: constant time per event, no memory per request but its
    `Progress`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sampled_s = clock.now_s()
        self._queued = False
        self._rates = Rates(0.0, 0.0, 0.0)
        # Since the last sample.
        self._new_starts = 0
        self._new_gaps_s = 0.0
        self._new_tokens = 0
        self._longest_gap_s = float("inf")
        # Decayed: starts and seconds while somebody waited, gaps and the tokens that came after them.
        self._starts = 0.0
        self._queued_s = 0.0
        self._gaps_s = 0.0
        self._tokens = 0.0
        self._output_tokens = 0.0
        self._prompt_tokens = 0.0
        self._num_outputs = 0
        self.ranks = RankCounts()
        """Those whose progress was begun and has not been left."""

    def begin(self, rank: int = 0, prompt: Prompt = "") -> "Progress":
        """A request was given to the engine, of an adapter of this rank (0: the base model); tell the answer
        of its steps, and leave it when the request has gone."""
        return Progress(self, rank, num_prompt_tokens(prompt))

    def rates(self, *, running: int, waiting: int) -> Rates:
        """The rates lately; `running` and `waiting` are the engine's now. To be called with every report."""
        now_s = self._clock.now_s()
        seconds = now_s - self._sampled_s
        if seconds < MIN_SAMPLE_S:
            return self._rates
        output_s = self._rates.output_tokens * self._rates.token_s
        memory_s = min(max(MIN_MEMORY_S, MEMORY_OUTPUTS * output_s), MAX_MEMORY_S)
        kept = max(0.0, 1.0 - seconds / memory_s)
        queued = self._queued and waiting > 0
        self._starts = self._starts * kept + (self._new_starts if queued else 0)
        self._queued_s = self._queued_s * kept + (seconds if queued else 0.0)
        self._gaps_s = self._gaps_s * kept + self._new_gaps_s
        self._tokens = self._tokens * kept + self._new_tokens
        self._new_starts = self._new_tokens = 0
        self._new_gaps_s = 0.0
        self._queued = waiting > 0
        self._sampled_s = now_s
        token_s = self._gaps_s / self._tokens if self._tokens > 1e-9 else self._rates.token_s
        self._longest_gap_s = MAX_SLOWDOWN * token_s if token_s > 0 else float("inf")
        starts_per_s = self._starts_per_s(running, token_s)
        self._rates = Rates(starts_per_s, token_s, self._output_tokens, self._prompt_tokens)
        return self._rates

    def _starts_per_s(self, running: int, token_s: float) -> float:
        """Counted while somebody waits; at first, a place is taken to be free after one output."""
        output_s = self._output_tokens * token_s
        if running > 0 and output_s > 0:
            return (self._starts + PRIOR_S * running / output_s) / (self._queued_s + PRIOR_S)
        return self._starts / self._queued_s if self._queued_s >= PRIOR_S else self._rates.starts_per_s

    def _end(self, prompt_tokens: int, output_tokens: int) -> None:
        self._num_outputs = min(self._num_outputs + 1, OUTPUTS_REMEMBERED)
        self._output_tokens += (output_tokens - self._output_tokens) / self._num_outputs
        self._prompt_tokens += (prompt_tokens - self._prompt_tokens) / self._num_outputs


class Progress:
    """One request's part in the rates; dropped without a word if it does not finish."""

    __slots__ = ("_last_s", "_meter", "_prompt_tokens", "_rank")

    def __init__(self, meter: Meter, rank: int, prompt_tokens: int) -> None:
        self._meter = meter
        self._rank = rank
        self._prompt_tokens = prompt_tokens
        self._last_s: float | None = None
        meter.ranks.begin(rank, prompt_tokens)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        started = self._last_s is not None
        self._meter.ranks.end(self._rank, self._prompt_tokens, started=started)

    def step(self, num_tokens: int) -> None:
        """An engine step gave the request so many tokens."""
        if num_tokens < 1:
            return
        meter = self._meter
        now_s = meter._clock.now_s()
        last_s = self._last_s
        self._last_s = now_s
        if last_s is None:
            meter._new_starts += 1
            meter.ranks.start(self._rank, self._prompt_tokens)
            return
        gap_s, longest_s = now_s - last_s, num_tokens * meter._longest_gap_s
        meter._new_gaps_s += gap_s if gap_s < longest_s else longest_s
        meter._new_tokens += num_tokens

    def finish(self, output_tokens: int) -> None:
        """The request came to its own end with so many tokens; a cancelled one does not call this."""
        self._meter._end(self._prompt_tokens, output_tokens)
