"""What a replica is asked for of each adapter: counts that only grow, for the controller to compare.

A request counts when it comes, with what it is expected to need, and is put right as it goes on: a replica
that has more to do than it can would otherwise look like one that has just enough. Knows no task and no
report's way: a report that is lost loses nothing, for the next one says it all again.
"""

from collections.abc import Collection

from loraserve.clock import Clock
from loraserve.request import GenerationRequest, GenerationStep, num_prompt_tokens
from placement.types import VersionId

FORGET_S = 600.0
"""Far longer than a replica may be silent towards the controller before it is taken for lost."""

OUTPUTS_REMEMBERED = 64


class _Version:
    """One version's counts: tokens asked for as known now, the most that was said of it, and its outputs'
    mean over about the last `OUTPUTS_REMEMBERED`."""

    __slots__ = ("asked", "changed_s", "num_outputs", "output_tokens", "said")

    def __init__(self) -> None:
        self.asked = 0
        self.said = 0
        self.changed_s = 0.0
        self.output_tokens = 0.0
        self.num_outputs = 0

    def expected_tokens(self, max_tokens: int) -> int:
        """What a request that may draw so many tokens draws, by those before it; at most what it may."""
        return min(max_tokens, round(self.output_tokens)) if self.num_outputs else max_tokens

    def learn(self, output_tokens: int) -> None:
        """A request has come to its own end."""
        self.num_outputs = min(self.num_outputs + 1, OUTPUTS_REMEMBERED)
        self.output_tokens += (output_tokens - self.output_tokens) / self.num_outputs


class TokenCounts:
    """Prompt and output tokens by version since the replica began; the base model's are not counted.

    A request that goes on here and began elsewhere counts without its prompt. What was expected and did
    not come is made up for by what comes next, so that no count ever falls. A version that the replica has
    not held for long is left out, and begins at 0 if it comes back.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._versions: dict[VersionId, _Version] = {}

    def begin(self, request: GenerationRequest) -> "RequestTokens":
        """A request has come; tell the answer of its steps, and leave it when the request has gone."""
        return RequestTokens(self, request)

    def refused(self, version: VersionId, prompt_tokens: int, max_tokens: int) -> None:
        """A router had to turn away a request of the version, for nobody had room for it."""
        self.add(version, prompt_tokens + self.version(version).expected_tokens(max_tokens))

    def version(self, version: VersionId) -> _Version:
        """The version's counts."""
        if (counts := self._versions.get(version)) is None:
            counts = self._versions[version] = _Version()
            counts.changed_s = self._clock.now_s()
        return counts

    def add(self, version: VersionId, num_tokens: int) -> None:
        """So many tokens more; less than 0 takes back what was expected."""
        counts = self.version(version)
        counts.asked += num_tokens
        counts.said = max(counts.said, counts.asked)
        counts.changed_s = self._clock.now_s()

    def totals(self, held: Collection[VersionId]) -> dict[VersionId, int]:
        """The counts so far; `held` are the versions that the replica holds in whatever way."""
        last_s = self._clock.now_s() - FORGET_S
        silent = {version for version, counts in self._versions.items() if counts.changed_s < last_s}
        for version in silent.difference(held):
            del self._versions[version]
        return {version: counts.said for version, counts in self._versions.items() if counts.said}


class RequestTokens:
    """One request's part in the counts.

    It ends as what it was served; what it lacks counts elsewhere if it goes on there. One that its client
    gave up before its first token still counts as expected: it was asked for.
    """

    __slots__ = ("_counted", "_counts", "_is_first", "_served", "_version")

    def __init__(self, counts: TokenCounts, request: GenerationRequest) -> None:
        self._counts = counts
        self._version = request.version_id
        self._is_first = not request.resumed_token_ids
        self._served = self._counted = 0
        if self._version is None:
            return
        drawn = len(request.resumed_token_ids)
        outputs = counts.version(self._version).expected_tokens(request.sampling.max_tokens)
        prompt = num_prompt_tokens(request.prompt) if self._is_first else 0
        self._count(prompt + max(0, outputs - drawn))

    def __enter__(self) -> "RequestTokens":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        was_given_up = kind is not None and not issubclass(kind, Exception)
        if self._served or not was_given_up:
            self._count(self._served)

    def step(self, step: GenerationStep) -> None:
        """What an engine step added."""
        if self._version is None:
            return
        num_tokens = len(step.token_ids)
        if self._is_first:
            self._is_first = False
            num_tokens += step.prompt_tokens
        self._served += num_tokens
        if self._served > self._counted:
            self._count(self._served)
        if step.finish_reason is not None:
            self._counts.version(self._version).learn(step.output_tokens)

    def _count(self, num_tokens: int) -> None:
        """The request is to count as so many tokens."""
        if self._version is not None and num_tokens != self._counted:
            self._counts.add(self._version, num_tokens - self._counted)
            self._counted = num_tokens
