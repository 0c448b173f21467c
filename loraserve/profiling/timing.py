"""Times the steps of a batch on a running engine, from when the tokens of its requests come.

Decode: the gaps of the stream that began last, while all run. Prompts: they are handed over while others
decode, and the step is the gap of these in which all first tokens came.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import fmean, median

from loraserve.clock import Clock
from loraserve.engines.base import Engine
from loraserve.errors import WorkFailedError
from loraserve.profiling.batches import Batch
from loraserve.profiling.fit import PromptPart, TimedStep
from loraserve.request import GenerationRequest, SamplingParams
from placement.types import VersionId

_FIRST_TOKEN = 8
"""Prompts use the vocabulary from here on: special tokens come first."""
_BESIDE_TOKENS = 48
_BEGUN_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A step of one request as it came: when, with how many tokens, and how many there were then."""

    at_s: float
    tokens: int
    drawn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter that the engine holds."""

    version_id: VersionId
    rank: int


@dataclass(slots=True)
class _Stream:
    arrivals: list[Arrival] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)


class StepTimer:
    """Runs batches; every prompt is drawn anew, so that no cache answers it."""

    def __init__(
        self,
        engine: Engine,
        adapters: Mapping[str, LoadedAdapter],
        clock: Clock,
        *,
        vocab_size: int,
        seed: int,
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._clock = clock
        self._vocab_size = vocab_size
        self._drawn = Random(seed)
        self._timeout_s = timeout_s
        self._requests = 0

    async def time(self, batch: Batch, decode_tokens: int) -> TimedStep | None:
        """One repetition, a decode batch over `decode_tokens` steps; None if the sequences did not come
        together. WorkFailedError if the engine does not answer in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if batch.prompts:
                    return await self._prompts(batch)
                return await self._decode(batch, decode_tokens)
        except TimeoutError as error:
            raise WorkFailedError(f"{batch.name}: no answer within {self._timeout_s:g} s") from error

    async def _decode(self, batch: Batch, tokens: int) -> TimedStep | None:
        streams = [_Stream() for _ in batch.decode]
        # Those that begin first draw a few more until the last one joins.
        output = tokens + 2 + len(batch.decode) // 4
        await asyncio.gather(
            *(
                self._follow(stream, adapter, batch.context_tokens, output)
                for stream, adapter in zip(streams, batch.decode, strict=True)
            )
        )
        gaps = shared_gaps([stream.arrivals for stream in streams])
        if not gaps:
            return None
        drawn = fmean(before for _, before in gaps)
        return self._step(batch, median(ms for ms, _ in gaps), round(drawn))

    async def _prompts(self, batch: Batch) -> TimedStep | None:
        beside = [_Stream() for _ in batch.decode]
        tasks = [
            asyncio.ensure_future(self._follow(stream, adapter, batch.context_tokens, _BESIDE_TOKENS))
            for stream, adapter in zip(beside, batch.decode, strict=True)
        ]
        try:
            await asyncio.gather(*(stream.begun.wait() for stream in beside))
            prompts = [_Stream() for _ in batch.prompts]
            await asyncio.gather(
                *(
                    self._follow(stream, adapter, tokens, 1)
                    for stream, (tokens, adapter) in zip(prompts, batch.prompts, strict=True)
                )
            )
            firsts_s = [stream.arrivals[0].at_s for stream in prompts]
            found = shared_step(beside[0].arrivals, firsts_s)
            if found is None or any(task.done() for task in tasks):
                return None
            step_ms, at_s = found
            drawn = sum(_drawn_by(stream.arrivals, at_s) for stream in beside)
            return self._step(batch, step_ms, drawn)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _step(self, batch: Batch, ms: float, drawn: int) -> TimedStep:
        """`drawn` counts the tokens that the decoding rows had drawn before the step, whose keys and values
        are in the cache when it is done."""
        ranks: dict[str | None, int] = {name: adapter.rank for name, adapter in self._adapters.items()}
        ranks[None] = 0
        return TimedStep(
            ms=ms,
            decode_ranks=tuple(ranks[adapter] for adapter in batch.decode),
            context_tokens=len(batch.decode) * batch.context_tokens + drawn,
            prompts=tuple(
                PromptPart(tokens=tokens, rank=ranks[adapter]) for tokens, adapter in batch.prompts
            ),
            adapters=len(batch.adapters),
        )

    async def _follow(self, stream: _Stream, adapter: str | None, prompt: int, output: int) -> None:
        drawn = 0
        request = self._request(adapter, prompt, output)
        async with contextlib.aclosing(self._engine.generate(request)) as generated:
            async for step in generated:
                if not step.token_ids:
                    continue
                drawn += len(step.token_ids)
                now_s = self._clock.now_s()
                stream.arrivals.append(Arrival(at_s=now_s, tokens=len(step.token_ids), drawn=drawn))
                if drawn >= _BEGUN_TOKENS:
                    stream.begun.set()
        if not stream.arrivals:
            raise WorkFailedError(f"request {request.request_id} ended without a token")

    def _request(self, adapter: str | None, prompt: int, output: int) -> GenerationRequest:
        self._requests += 1
        low = min(_FIRST_TOKEN, self._vocab_size - 1)
        return GenerationRequest(
            request_id=f"profile-step-{self._requests}",
            prompt=tuple(self._drawn.randrange(low, self._vocab_size) for _ in range(prompt)),
            version_id=self._adapters[adapter].version_id if adapter else None,
            sampling=SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
        )


def shared_gaps(streams: Sequence[Sequence[Arrival]]) -> list[tuple[float, int]]:
    """The gaps, in ms, of the stream that began last, while all of the streams run, each with the tokens that
    all of them had drawn when it began; a message of several tokens counts as so many equal gaps."""
    last = max(streams, key=lambda arrivals: arrivals[0].at_s)
    end_s = min(arrivals[-1].at_s for arrivals in streams)
    gaps: list[tuple[float, int]] = []
    for before, after in pairwise(last):
        # What ends together comes in one message, but is read one after the other.
        if before.at_s < end_s:
            drawn = sum(_drawn_by(arrivals, before.at_s) for arrivals in streams)
            gap_ms = (after.at_s - before.at_s) * 1e3 / after.tokens
            gaps += [(gap_ms, drawn + number * len(streams)) for number in range(after.tokens)]
    return gaps


def shared_step(beside: Sequence[Arrival], firsts_s: Sequence[float]) -> tuple[float, float] | None:
    """How many ms the step took that gave `beside` a token and others their first ones, at `firsts_s`, and
    when it began; None if these came in different steps, or in none that can be timed."""
    steps = {min(range(len(beside)), key=lambda at: abs(beside[at].at_s - first)) for first in firsts_s}
    number = steps.pop()
    if steps or number == 0 or beside[number].tokens != 1:
        return None
    began_s, ended_s = beside[number - 1].at_s, beside[number].at_s
    apart_s = max(abs(ended_s - first) for first in firsts_s)
    # A first token far from any of these came when they had ended.
    return ((ended_s - began_s) * 1e3, began_s) if apart_s < (ended_s - began_s) / 2 else None


def _drawn_by(arrivals: Sequence[Arrival], at_s: float) -> int:
    """Tokens drawn at this time, those of this very moment included."""
    return max((one.drawn for one in arrivals if one.at_s <= at_s), default=0)
