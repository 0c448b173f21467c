"""What a replica has served of each adapter: counts that only grow, for the controller to compare.

Knows no task and no report's way: a report that is lost loses nothing, for the next one says it all again.
"""

from collections.abc import Collection

from loraserve.clock import Clock
from loraserve.request import GenerationRequest, GenerationStep
from placement.types import VersionId

FORGET_S = 600.0
"""Far longer than a replica may be silent towards the controller before it is taken for lost."""


class TokenCounts:
    """Prompt and output tokens by version since the replica began; the base model's are not counted.

    A prompt counts with the first step, and not when a request goes on here that began elsewhere. A
    version that the replica has not held for long is left out, and begins at 0 if it comes back.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._totals: dict[VersionId, int] = {}
        self._changed_s: dict[VersionId, float] = {}

    def begin(self, request: GenerationRequest) -> "RequestTokens":
        """A request was given to the engine; tell the answer of its steps."""
        return RequestTokens(self, request)

    def add(self, version: VersionId, num_tokens: int) -> None:
        """So many tokens more."""
        self._totals[version] = self._totals.get(version, 0) + num_tokens
        self._changed_s[version] = self._clock.now_s()

    def totals(self, held: Collection[VersionId]) -> dict[VersionId, int]:
        """The counts so far; `held` are the versions that the replica holds in whatever way."""
        last_s = self._clock.now_s() - FORGET_S
        silent = {version for version, at_s in self._changed_s.items() if at_s < last_s}
        for version in silent.difference(held):
            del self._totals[version], self._changed_s[version]
        return dict(self._totals)


class RequestTokens:
    """One request's part in the counts."""

    __slots__ = ("_counts", "_is_first", "_version")

    def __init__(self, counts: TokenCounts, request: GenerationRequest) -> None:
        self._counts = counts
        self._version = request.version_id
        self._is_first = not request.resumed_token_ids

    def step(self, step: GenerationStep) -> None:
        """What an engine step added."""
        if self._version is None:
            return
        num_tokens = len(step.token_ids)
        if self._is_first:
            self._is_first = False
            num_tokens += step.prompt_tokens
        if num_tokens:
            self._counts.add(self._version, num_tokens)
