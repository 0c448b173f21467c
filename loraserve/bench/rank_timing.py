"""Times one row on a running engine.

Prefill of one prompt: from handing the request to the engine until its first token is here, with nothing
taken off. Prefill of several prompts: they come while another request, without adapter, decodes, and are
computed in one of its steps; the time is that step's, from one of its tokens to the next. Decode: all
sequences run; the median gap between the tokens of the one that came last, while all of them run.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median

from loraserve.bench.rank_rows import Row
from loraserve.engines.base import Engine
from loraserve.errors import WorkFailedError
from loraserve.request import GenerationRequest, SamplingParams
from placement.types import VersionId

_TIMEOUT_S = 300.0
_TRIES = 50
_BESIDE_TOKENS = 6
_FIRST_TOKEN = 8
"""Prompts use the vocabulary from here on: special tokens come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A step of one request as it came: when, and with how many tokens."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One repetition; `gaps_ms` are the gaps of a decode row, one per token."""

    ms: float
    gaps_ms: tuple[float, ...] = ()


class Timer:
    """Runs rows; every prompt is drawn anew, so that no cache answers it."""

    def __init__(
        self, engine: Engine, versions: Mapping[str, VersionId], *, vocab_size: int, seed: int
    ) -> None:
        self._engine = engine
        self._versions = versions
        self._vocab_size = vocab_size
        self._drawn = Random(seed)
        self._requests = 0

    async def time(self, row: Row) -> Sample:
        """One repetition; WorkFailedError if the engine does not answer in time."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if row.kind == "decode":
                    return await self._decode(row)
                if len(row.adapters) == 1:
                    return await self._lone_prefill(row)
                return await self._batch_prefill(row)
        except TimeoutError as error:
            raise WorkFailedError(f"{row.name}: no answer within {_TIMEOUT_S:g} s") from error

    async def _lone_prefill(self, row: Row) -> Sample:
        request = self._request(row, row.adapters[0])
        began_s = time.perf_counter()
        arrivals = await self._run(request)
        return Sample(ms=(arrivals[0].at_s - began_s) * 1e3)

    async def _batch_prefill(self, row: Row) -> Sample:
        for _ in range(_TRIES):
            beside = self._prompt_request(None, row.prompt_tokens, _BESIDE_TOKENS)
            batch = [self._request(row, adapter) for adapter in row.adapters]
            async with contextlib.aclosing(self._arrivals(beside)) as stream:
                first = await anext(stream)
                rest, *others = await asyncio.gather(_collect(stream), *(self._run(one) for one in batch))
            step_ms = shared_step_ms([first, *rest], [arrivals[0].at_s for arrivals in others])
            if step_ms is not None:
                return Sample(ms=step_ms)
        raise WorkFailedError(f"{row.name}: the prompts did not come into one step, {_TRIES} times in a row")

    async def _decode(self, row: Row) -> Sample:
        requests = [self._request(row, adapter) for adapter in row.adapters]
        gaps = decode_gaps_ms(await asyncio.gather(*(self._run(one) for one in requests)))
        if not gaps:
            raise WorkFailedError(f"{row.name}: the sequences never ran side by side")
        return Sample(ms=median(gaps), gaps_ms=tuple(gaps))

    async def _run(self, request: GenerationRequest) -> list[Arrival]:
        async with contextlib.aclosing(self._arrivals(request)) as stream:
            arrivals = await _collect(stream)
        if not arrivals:
            raise WorkFailedError(f"request {request.request_id} ended without a token")
        return arrivals

    async def _arrivals(self, request: GenerationRequest) -> AsyncGenerator[Arrival, None]:
        async with contextlib.aclosing(self._engine.generate(request)) as stream:
            async for step in stream:
                if step.token_ids:
                    yield Arrival(at_s=time.perf_counter(), tokens=len(step.token_ids))

    def _request(self, row: Row, adapter: str | None) -> GenerationRequest:
        return self._prompt_request(adapter, row.prompt_tokens, row.output_tokens)

    def _prompt_request(self, adapter: str | None, prompt: int, output: int) -> GenerationRequest:
        self._requests += 1
        low = min(_FIRST_TOKEN, self._vocab_size - 1)
        return GenerationRequest(
            request_id=f"bench-{self._requests}",
            prompt=tuple(self._drawn.randrange(low, self._vocab_size) for _ in range(prompt)),
            version_id=self._versions[adapter] if adapter else None,
            sampling=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
        )


async def _collect(stream: AsyncGenerator[Arrival, None]) -> list[Arrival]:
    return [arrival async for arrival in stream]


def shared_step_ms(beside: Sequence[Arrival], firsts_s: Sequence[float]) -> float | None:
    """How long the step took that gave `beside` a token and others their first ones, at `firsts_s`; None if
    these came in different steps, or in none that can be timed."""
    steps = {min(range(len(beside)), key=lambda at: abs(beside[at].at_s - first)) for first in firsts_s}
    number = steps.pop()
    if steps or number == 0 or beside[number].tokens != 1:
        return None
    step_s = beside[number].at_s - beside[number - 1].at_s
    apart_s = max(abs(beside[number].at_s - first) for first in firsts_s)
    # A first token far from any of these came when they had ended.
    return step_s * 1e3 if apart_s < step_s / 2 else None


def decode_gaps_ms(streams: Sequence[Sequence[Arrival]]) -> list[float]:
    """The gaps of the stream that began last, while all of the streams run; a step that brought several
    tokens counts as so many equal gaps."""
    last = max(streams, key=lambda arrivals: arrivals[0].at_s)
    end_s = min(arrivals[-1].at_s for arrivals in streams)
    gaps: list[float] = []
    for before, after in pairwise(last):
        # What ends together comes in one message, but is read one after the other.
        if before.at_s < end_s:
            gaps += [(after.at_s - before.at_s) * 1e3 / after.tokens] * after.tokens
    return gaps
