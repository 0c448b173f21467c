"""Open-loop load on one replica, and whether it stays inside the SLO.

Requests come at even distances, whatever becomes of those before, as LoRAServe's own profiling has it; their
lengths are drawn evenly from half to one and a half times the mean.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from loraserve.clock import Clock
from loraserve.engines.base import Engine
from loraserve.request import GenerationRequest, SamplingParams
from placement.profile import LoadProbe, Slo
from placement.types import VersionId

Sleep = Callable[[float], Awaitable[None]]

PERCENTILE = 0.95
_FIRST_TOKEN = 8
_WARM_UP_SHARE = 0.2
_LEAST_REQUESTS = 20
_LEAST_GAPS = 20
_GROWTH_SHARE = 0.05
_GROWTH_REQUESTS = 2
_LOOK_S = 0.05
_LOOKS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShape:
    """Means of a request's lengths; requests come for `probe_s`, or as long as 20 of them take to come, but
    for `limit_s` at most, and at most `max_requests` of them."""

    prompt_tokens: int
    output_tokens: int
    probe_s: float
    limit_s: float
    max_requests: int = 8_000

    def count(self, requests_per_s: float) -> int:
        """How many requests a probe of this rate sends."""
        longest = self.limit_s * requests_per_s
        return int(
            max(1, min(longest, self.max_requests, max(self.probe_s * requests_per_s, _LEAST_REQUESTS)))
        )


@dataclass(slots=True)
class _Sent:
    """One request: when it came, and its tokens' times."""

    at_s: float
    prompt_tokens: int
    token_s: list[float] = field(default_factory=list)


class LoadDriver:
    """Probes one engine that holds the adapters it is given."""

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock,
        sleep: Sleep,
        shape: LoadShape,
        slo: Slo,
        vocab_size: int,
        seed: int,
        name: str = "profile-load",
    ) -> None:
        self._engine = engine
        self._name = name
        self._clock = clock
        self._sleep = sleep
        self._shape = shape
        self._slo = slo
        self._vocab_size = vocab_size
        self._seed = seed
        self._requests = 0

    async def probe(
        self, requests_per_s: float, versions: Sequence[VersionId | None], rank: int | None
    ) -> LoadProbe:
        """Send requests at this rate to the versions in turn, and see how they fare.

        It ends early once more of them than the percentile allows have missed the first token's target.
        What comes first warms up, and counts for nothing.
        """
        await self._settle()
        began_s = self._clock.now_s()
        sent: list[_Sent] = []
        tasks: list[asyncio.Task[None]] = []
        try:
            steady = await self._send(requests_per_s, versions, sent, tasks)
            ended_s = self._clock.now_s()
            if steady:
                await self._await_tokens(sent, tasks, began_s, ended_s)
        finally:
            await _end(tasks)
        return self._told(
            sent,
            rank,
            requests_per_s,
            began_s=began_s + _WARM_UP_SHARE * (ended_s - began_s),
            ended_s=ended_s,
            steady=steady,
        )

    async def _settle(self) -> None:
        """Wait for the step that computes what an earlier probe has given up: no engine breaks it off."""
        request = self._request(Random(self._seed), None, prompt_tokens=1, output_tokens=1)
        await self._follow(_Sent(at_s=0.0, prompt_tokens=1), request)

    async def _send(
        self,
        requests_per_s: float,
        versions: Sequence[VersionId | None],
        sent: list[_Sent],
        tasks: list["asyncio.Task[None]"],
    ) -> bool:
        """Whether the load is one that the engine keeps up with, so far: the queue hardly grows from half of
        the time to its end, and first tokens are not late already."""
        drawn = Random(self._seed)
        count = self._shape.count(requests_per_s)
        look = max(1, count // _LOOKS)
        warm_up = int(_WARM_UP_SHARE * count)
        allowed = int((1 - PERCENTILE) * (count - warm_up))
        began_s = self._clock.now_s()
        waiting_half = 0
        for number in range(count):
            due_s = began_s + number / requests_per_s
            # Late, a turn of the loop is still due, or the engine's tokens are never read.
            await self._sleep(max(0.0, due_s - self._clock.now_s()))
            request = self._request(
                drawn,
                versions[number % len(versions)],
                prompt_tokens=_length(drawn, self._shape.prompt_tokens),
                output_tokens=_length(drawn, self._shape.output_tokens),
            )
            one = _Sent(at_s=due_s, prompt_tokens=len(request.prompt))
            sent.append(one)
            tasks.append(asyncio.create_task(self._follow(one, request)))
            if number == count // 2:
                waiting_half = _waiting(sent)
            if number % look == look - 1 and self._late(sent[warm_up:]) > allowed:
                return False
        growth = _waiting(sent) - waiting_half - _GROWTH_REQUESTS
        return growth <= _GROWTH_SHARE * count / 2

    async def _await_tokens(
        self, sent: Sequence[_Sent], tasks: Sequence["asyncio.Task[None]"], began_s: float, ended_s: float
    ) -> None:
        """Until every request has a first token or has missed its target, and there are gaps to judge by, or
        all have ended."""
        first_s = ended_s + self._slo.ttft_ms / 1e3
        gaps_s = first_s + 2 * self._shape.output_tokens * self._slo.tbt_ms / 1e3
        few = len(_gaps_ms(sent, began_s, ended_s)) < _LEAST_GAPS
        while not all(task.done() for task in tasks):
            now_s = self._clock.now_s()
            for_first = _waiting(sent) > 0 and now_s < first_s
            for_gaps = few and now_s < gaps_s and len(_gaps_ms(sent)) < _LEAST_GAPS
            if not (for_first or for_gaps):
                return
            await self._sleep(_LOOK_S)

    async def _follow(self, one: _Sent, request: GenerationRequest) -> None:
        async with contextlib.aclosing(self._engine.generate(request)) as stream:
            async for step in stream:
                now_s = self._clock.now_s()
                one.token_s += _spread(one.token_s, now_s, len(step.token_ids))

    def _late(self, sent: Sequence[_Sent]) -> int:
        limit_s, now_s = self._slo.ttft_ms / 1e3, self._clock.now_s()
        return sum(1 for one in sent if (one.token_s[0] if one.token_s else now_s) - one.at_s > limit_s)

    def _told(
        self,
        sent: Sequence[_Sent],
        rank: int | None,
        requests_per_s: float,
        *,
        began_s: float,
        ended_s: float,
        steady: bool,
    ) -> LoadProbe:
        now_s = self._clock.now_s()
        counted = [one for one in sent if one.at_s >= began_s] or list(sent)
        firsts_ms = [1e3 * ((one.token_s[0] if one.token_s else now_s) - one.at_s) for one in counted]
        gaps_ms = _gaps_ms(sent, began_s, ended_s)
        if len(gaps_ms) < _LEAST_GAPS:
            gaps_ms = _gaps_ms(sent)
        tokens = 0
        for one in sent:
            tokens += sum(1 for at_s in one.token_s if began_s <= at_s < ended_s)
            tokens += one.prompt_tokens if one.token_s and began_s <= one.token_s[0] < ended_s else 0
        ttft_ms, tbt_ms = percentile(firsts_ms), percentile(gaps_ms)
        span_s = ended_s - began_s
        if len(sent) <= _LEAST_REQUESTS:
            # Too few for a window: all their tokens over the time that so many take to come.
            tokens = sum(one.prompt_tokens * bool(one.token_s) + len(one.token_s) for one in sent)
            span_s = len(sent) / requests_per_s
        return LoadProbe(
            rank=rank,
            requests_per_s=requests_per_s,
            tokens_per_s=tokens / span_s if span_s > 0 else 0.0,
            ttft_p95_ms=ttft_ms,
            tbt_p95_ms=tbt_ms,
            inside=steady and ttft_ms <= self._slo.ttft_ms and tbt_ms <= self._slo.tbt_ms,
        )

    def _request(
        self, drawn: Random, version: VersionId | None, *, prompt_tokens: int, output_tokens: int
    ) -> GenerationRequest:
        self._requests += 1
        low = min(_FIRST_TOKEN, self._vocab_size - 1)
        return GenerationRequest(
            request_id=f"{self._name}-{self._requests}",
            prompt=tuple(drawn.randrange(low, self._vocab_size) for _ in range(prompt_tokens)),
            version_id=version,
            sampling=SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True),
        )


def percentile(values: Sequence[float]) -> float:
    """The smallest value that 95 % of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * 95 // 100) - 1)] if ordered else 0.0


def _spread(before_s: Sequence[float], now_s: float, tokens: int) -> list[float]:
    """Times of tokens that came in one message, at even distances since the one before."""
    last_s = before_s[-1] if before_s else now_s
    return [last_s + (now_s - last_s) * number / tokens for number in range(1, tokens + 1)]


def _gaps_ms(sent: Sequence[_Sent], began_s: float = -math.inf, ended_s: float = math.inf) -> list[float]:
    """Between tokens of which the second came in this time."""
    return [
        1e3 * (after - before)
        for one in sent
        for before, after in pairwise(one.token_s)
        if began_s <= after < ended_s
    ]


def _waiting(sent: Sequence[_Sent]) -> int:
    return sum(1 for one in sent if not one.token_s)


def _length(drawn: Random, mean: int) -> int:
    return drawn.randint(max(1, mean - mean // 2), mean + mean // 2)


async def _end(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Cancel what still runs; an engine that failed under the load is an error."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
