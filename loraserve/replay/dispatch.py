"""The open loop: send each request when it is due, and make one record of each.

Owns the schedule and the requests in flight. Knows nothing of files, terminals or how requests travel:
it takes a clock, a sleep and a `Target`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loraserve.client_types import ServedBy
from loraserve.clock import Clock
from loraserve.errors import DeadlineError, LoraServeError, OverloadedError
from loraserve.replay.prompts import PromptSource
from loraserve.request import FinishReason, GenerationStep, SamplingParams
from traces.records import Outcome, RequestRecord
from traces.types import TraceRequest

Sleep = Callable[[float], Awaitable[None]]


class Answer(Protocol):
    """The stream of one request, as `loraserve.client.GenerationStream` is one."""

    @property
    def adapter_version(self) -> str | None: ...

    @property
    def served_by(self) -> ServedBy: ...

    @property
    def attempts(self) -> int: ...

    @property
    def resumed(self) -> bool: ...

    def __aiter__(self) -> AsyncIterator[GenerationStep]: ...

    def cancel(self) -> None: ...


class Target(Protocol):
    """What requests are sent to, as `loraserve.client.Client` is one; `generate` must not wait."""

    def generate(
        self,
        prompt: tuple[int, ...],
        *,
        adapter: str,
        sampling: SamplingParams,
        request_id: str,
        timeout_s: float,
    ) -> Answer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOptions:
    """`max_in_flight` is a guard for the client's memory: a request beyond it is refused on the spot,
    since waiting would break the open loop. `warmup_s` and `warmup_requests` mark the first requests;
    the schedule's zero is `lead_s` after the start."""

    run_id: str
    timeout_s: float = 600.0
    max_in_flight: int = 8192
    warmup_s: float = 0.0
    warmup_requests: int = 0
    lead_s: float = 0.0


@dataclass(slots=True)
class Progress:
    """Counts while a replay runs."""

    total: int
    sent: int = 0
    ended: int = 0
    ok: int = 0
    local_refusals: int = 0


class Dispatcher:
    """One replay of a schedule; `run` once."""

    def __init__(
        self,
        schedule: Sequence[tuple[float, TraceRequest]],
        target: Target,
        prompts: PromptSource,
        options: DispatchOptions,
        *,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._schedule = schedule
        self._target = target
        self._prompts = prompts
        self._options = options
        self._clock = clock
        self._sleep = sleep
        self._origin_s = 0.0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._records: list[RequestRecord] = []
        self.progress = Progress(total=len(schedule))

    async def run(self, stop: asyncio.Event) -> tuple[RequestRecord, ...]:
        """The records of all requests sent, by index.

        Setting `stop` ends the sending and cancels what is in flight, which is recorded so; requests
        not yet due then were never sent and have no record.
        """
        sending = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
                while self._in_flight and not stop.is_set():
                    await asyncio.wait({*self._in_flight, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, stopping, *self._in_flight):
                task.cancel()
            await asyncio.gather(sending, stopping, *self._in_flight, return_exceptions=True)
        return tuple(sorted(self._records, key=lambda record: record.index))

    async def _send_all(self) -> None:
        self._origin_s = self._clock.now_s() + self._options.lead_s
        for due_s, request in self._schedule:
            # Made before the wait, so that a long prompt does not delay its own sending.
            prompt = self._prompts.prompt(request.index, request.prompt_tokens)
            await self._wait_until(due_s)
            self._send(due_s, request, prompt)

    async def _wait_until(self, due_s: float) -> None:
        # Compared on the clock's own scale: a difference to the origin could round to a wait without end.
        target_s = self._origin_s + due_s
        while (left_s := target_s - self._clock.now_s()) > 0:
            await self._sleep(left_s)

    def _send(self, due_s: float, request: TraceRequest, prompt: tuple[int, ...]) -> None:
        sent_s = self._now_s()
        self.progress.sent += 1
        one = _Measurement(request, due_s, sent_s, self._options)
        if len(self._in_flight) >= self._options.max_in_flight:
            self.progress.local_refusals += 1
            limit = self._options.max_in_flight
            one.end(Outcome.REFUSED, f"not sent: {limit} requests were in flight", sent_s)
            self._end(one, None)
            return
        answer = self._target.generate(
            prompt,
            adapter=request.adapter or "",
            sampling=SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True),
            request_id=one.request_id,
            timeout_s=self._options.timeout_s,
        )
        task = asyncio.create_task(self._read(answer, one))
        self._in_flight.add(task)
        # Not in the task itself: one that is cancelled before its first turn runs no code at all.
        task.add_done_callback(lambda task: self._ended(task, one, answer))

    async def _read(self, answer: Answer, one: "_Measurement") -> None:
        outcome, status = Outcome.FAILED, "the stream ended without a finish reason"
        try:
            async for step in answer:
                one.add(step, self._now_s())
                if step.finish_reason is not None:
                    outcome, status = one.verdict(step.finish_reason)
        except OverloadedError as error:
            outcome, status = Outcome.REFUSED, str(error)
        except DeadlineError as error:
            status = f"deadline: {error}"
        except LoraServeError as error:
            status = f"{type(error).__name__}: {error}"
        one.end(outcome, status, self._now_s())

    def _ended(self, task: "asyncio.Task[None]", one: "_Measurement", answer: Answer) -> None:
        self._in_flight.discard(task)
        if task.cancelled():
            one.end(Outcome.CANCELLED, "the replay was stopped", self._now_s())
        elif (error := task.exception()) is not None:
            one.end(Outcome.FAILED, f"the client failed: {error!r}", self._now_s())
        answer.cancel()
        self._end(one, answer)

    def _end(self, one: "_Measurement", answer: Answer | None) -> None:
        record = one.record(answer)
        self._records.append(record)
        self.progress.ended += 1
        self.progress.ok += record.outcome is Outcome.OK

    def _now_s(self) -> float:
        return self._clock.now_s() - self._origin_s


class _Measurement:
    """What is seen of one request while it runs."""

    def __init__(self, request: TraceRequest, due_s: float, sent_s: float, options: DispatchOptions) -> None:
        self.request_id = f"{options.run_id}-{request.index}"
        self._request = request
        self._due_s = due_s
        self._sent_s = sent_s
        self._warmup = request.index < options.warmup_requests or due_s < options.warmup_s
        self._times_s: list[float] = []
        self._tokens: list[int] = []
        self._end: tuple[Outcome, str, float] = (Outcome.FAILED, "unknown", sent_s)

    def end(self, outcome: Outcome, status: str, end_s: float) -> None:
        """Note how and when it ended."""
        self._end = (outcome, status, end_s)

    def add(self, step: GenerationStep, now_s: float) -> None:
        """Note one message; one without tokens carries no time that counts."""
        if step.token_ids:
            self._times_s.append(now_s)
            self._tokens.append(len(step.token_ids))

    def verdict(self, reason: FinishReason) -> tuple[Outcome, str]:
        """The outcome of a stream that ended by itself."""
        if reason is FinishReason.ABORTED:
            return Outcome.FAILED, "aborted by the server"
        got, wanted = sum(self._tokens), self._request.output_tokens
        if got < wanted:
            return Outcome.TRUNCATED, f"{got} of {wanted} tokens"
        return Outcome.OK, ""

    def record(self, answer: Answer | None) -> RequestRecord:
        """The request's one record; `answer` None was never sent."""
        outcome, status, end_s = self._end
        request = self._request
        return RequestRecord(
            index=request.index,
            request_id=self.request_id,
            adapter=request.adapter,
            rank=request.rank,
            scheduled_s=self._due_s,
            sent_s=self._sent_s,
            end_s=end_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=sum(self._tokens),
            expected_output_tokens=request.output_tokens,
            outcome=outcome,
            status=status,
            message_times_s=tuple(self._times_s),
            message_tokens=tuple(self._tokens),
            replica_id=answer.served_by.replica if answer else None,
            adapter_version=answer.adapter_version if answer else None,
            attempts=answer.attempts if answer else 0,
            resumed=answer is not None and answer.resumed,
            warmup=self._warmup,
        )
