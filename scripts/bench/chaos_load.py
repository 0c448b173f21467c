"""The load of `scripts/bench/chaos`: requests whose right answers are known, and what became of each."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from random import Random

from loraserve.rpc.tuning import tune_grpc

tune_grpc()

from chaos_account import Bucket, Expected, Received, Tally, judge_part, judge_whole  # noqa: E402
from chaos_versions import Versions  # noqa: E402

from loraserve.client import Client, GenerationStream  # noqa: E402
from loraserve.engines.outputs import Output  # noqa: E402
from loraserve.engines.tokenizer import PromptRenderer  # noqa: E402
from loraserve.errors import LoraServeError, OverloadedError, UnavailableError  # noqa: E402
from loraserve.request import GenerationRequest, GenerationStep, SamplingParams  # noqa: E402
from placement.types import VersionId  # noqa: E402

TIMEOUT_S = 60.0
"""Far longer than any request takes when all is well: one that comes near it was stuck."""

HUNG_AFTER_S = TIMEOUT_S + 10.0
TOKENS = (10, 120)
PROMPTS = (
    "Once upon a time",
    "The harbour wakes before the town does.",
    "What is the capital of the kingdom?",
    "Tell me about the sea. Tell me how the engine works.",
    "Der Fluß friert im Winter zu – 0 °C",
    "A small computer in the cellar counts the days.",
)
SHARES: Mapping[str, int] = {
    "greedy": 45,
    "stop": 10,
    "unseeded": 20,
    "unary": 10,
    "seeded": 10,
    "logprobs": 5,
}
"""Kinds of request by their share; the last two cannot go on elsewhere after their first token."""

REPLACED = "the request began with"
"""What is said when the weights that an answer began with are gone for good."""

MAX_EXPECTED = 4096
MAX_NOTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; `mode` names the client that sends it."""

    serial: int
    mode: str
    kind: str
    adapter: str
    prompt: str
    sampling: SamplingParams


@dataclass(slots=True)
class Outcome:
    """What the client gave for one request."""

    received: Received = field(default_factory=Received)
    version: str | None = None
    moved: bool = False
    attempts: int = 1
    pause_s: float = 0.0
    error: LoraServeError | None = None
    hung: bool = False


class Oracle:
    """What each version says to each request: the emulated engine's own output, never run anywhere."""

    def __init__(self, model: str) -> None:
        self._renderer = PromptRenderer.load(model)
        self._words = self._renderer.clean_ids()
        self._known: dict[tuple[str, str, SamplingParams], Expected] = {}

    def expected(self, version: str, prompt: str, sampling: SamplingParams) -> Expected:
        """The whole answer."""
        key = (version, prompt, sampling)
        if key not in self._known:
            if len(self._known) >= MAX_EXPECTED:
                self._known.clear()
            self._known[key] = self._draw(*key)
        return self._known[key]

    def _draw(self, version: str, prompt: str, sampling: SamplingParams) -> Expected:
        request = GenerationRequest(
            request_id="", prompt=prompt, version_id=VersionId(version), sampling=sampling
        )
        prompt_ids = self._renderer.prompt_ids(prompt)
        output = Output(request, prompt_ids, self._renderer, self._words, sampling.max_tokens)
        while not output.finished:
            output.extend()
        step = output.take()
        assert step is not None
        assert step.finish_reason is not None
        return Expected(token_ids=step.token_ids, text=step.text, finish=step.finish_reason.value)


class Load:
    """Keeps `num_workers` requests in flight, over the clients in turn, until told to stop."""

    def __init__(
        self, clients: Mapping[str, Client], versions: Versions, oracle: Oracle, rng: Random
    ) -> None:
        """`versions` are those of the registered adapters."""
        self._clients = clients
        self._versions = versions
        self._adapters = versions.names
        self._oracle = oracle
        self._rng = rng
        self._serial = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.tally = Tally()
        self.resumed = 0
        self.sent_again = 0
        self.unavailable: Counter[str] = Counter()
        self.by_mode: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.longest_s = 0.0
        self.longest = ""
        self.longest_pause_s = 0.0
        self.is_calm = True
        """Until the first kill, after which pauses are the kills'."""
        self.notes: list[str] = []
        self.begun_s = time.monotonic()

    def start(self, num_workers: int) -> None:
        """Begin."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(num_workers)]

    async def stop(self) -> None:
        """Send nothing new and wait for what runs, which ends by its deadline at the latest."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        self.tally.check()

    async def probe(self, client: Client, adapter: str) -> bool:
        """One short request through this client, accounted for like any other; whether it was answered."""
        request = self._draw(adapter=adapter, kind="greedy", mode="probe")
        request = replace(request, sampling=SamplingParams(temperature=0.0, max_tokens=2))
        return await self._run(client, request) is Bucket.COMPLETED

    async def _work(self) -> None:
        while not self._stopping:
            mode = self._rng.choice(list(self._clients))
            kind = self._rng.choices(list(SHARES), list(SHARES.values()))[0]
            request = self._draw(adapter=self._rng.choice(self._adapters), kind=kind, mode=mode)
            bucket = await self._run(self._clients[mode], request)
            if bucket is Bucket.REFUSED or bucket is Bucket.ENDED_UNAVAILABLE:
                await asyncio.sleep(0.1)

    def _draw(self, *, adapter: str, kind: str, mode: str) -> Request:
        self._serial += 1
        rng = self._rng
        prompt = f"{rng.choice(PROMPTS)} {rng.randrange(8)}"
        sampling = SamplingParams(temperature=0.0, max_tokens=rng.randint(*TOKENS), min_tokens=2)
        if kind == "unseeded":
            sampling = replace(sampling, temperature=1.0, ignore_eos=True)
        elif kind == "seeded":
            sampling = replace(sampling, temperature=1.0, seed=rng.randrange(4))
        elif kind == "logprobs":
            sampling = replace(sampling, logprobs=1)
        elif kind == "stop":
            text = self._oracle.expected(self._versions.newest(adapter), prompt, sampling).text
            at = len(text) * 2 // 3
            sampling = replace(sampling, stop=(text[at : at + 4] or "never said",))
        return Request(
            serial=self._serial, mode=mode, kind=kind, adapter=adapter, prompt=prompt, sampling=sampling
        )

    async def _run(self, client: Client, request: Request) -> Bucket:
        self.tally.begin()
        self.by_mode[request.mode] += 1
        self.by_kind[request.kind] += 1
        outcome, begun_s = Outcome(), time.monotonic()
        try:
            async with asyncio.timeout(HUNG_AFTER_S):
                if request.kind == "unary":
                    await self._complete(client, request, outcome)
                else:
                    await self._stream(client, request, outcome)
        except TimeoutError:
            outcome.hung = True
        except LoraServeError as error:
            outcome.error = error
        seconds = time.monotonic() - begun_s
        if seconds > self.longest_s:
            self.longest_s = seconds
            self.longest = (
                f"{begun_s - self.begun_s:.1f} s: request {request.serial} ({request.mode}, {request.kind},"
                f" {request.adapter}, {len(outcome.received.token_ids)} tokens, {outcome.attempts} attempts)"
                f" took {seconds:.1f} s"
            )
        bucket, note = self._judge(request, outcome, begun_s)
        if note:
            self._note(request, outcome, bucket, note, seconds)
        if bucket is Bucket.COMPLETED:
            self.resumed += outcome.moved
            self.sent_again += outcome.attempts > 1
            if self.is_calm:
                self.longest_pause_s = max(self.longest_pause_s, outcome.pause_s)
        self.tally.end(bucket)
        return bucket

    async def _complete(self, client: Client, request: Request, outcome: Outcome) -> None:
        done = await client.complete(
            request.prompt, adapter=request.adapter, sampling=request.sampling, timeout_s=TIMEOUT_S
        )
        outcome.version = done.adapter_version
        outcome.moved = done.served_by.failovers > 0
        outcome.attempts = done.attempts
        outcome.received = _received([done.step])

    async def _stream(self, client: Client, request: Request, outcome: Outcome) -> None:
        steps: list[GenerationStep] = []
        stream: GenerationStream = client.generate(
            request.prompt, adapter=request.adapter, sampling=request.sampling, timeout_s=TIMEOUT_S
        )
        async with aclosing(stream):
            last_s = time.monotonic()
            try:
                async for step in stream:
                    steps.append(step)
                    now_s = time.monotonic()
                    outcome.pause_s, last_s = max(outcome.pause_s, now_s - last_s), now_s
            finally:
                outcome.version = stream.adapter_version
                outcome.moved = stream.resumed or stream.served_by.failovers > 0
                outcome.attempts = stream.attempts
                outcome.received = _received(steps)

    def _judge(self, request: Request, outcome: Outcome, sent_s: float) -> tuple[Bucket, str]:
        """The bucket, and what there is to say of it."""
        if outcome.hung:
            return Bucket.LOST, f"nothing ended it within {HUNG_AFTER_S:g} s"
        allowed = self._versions.may_answer(request.adapter, sent_s, time.monotonic())
        if outcome.version not in allowed and (outcome.version or outcome.received.token_ids):
            return Bucket.WRONG_ADAPTER, f"answered by {outcome.version}, not {sorted(allowed)}"
        right = outcome.version or self._versions.newest(request.adapter)
        expected = self._oracle.expected(right, request.prompt, request.sampling)
        if outcome.error is None:
            bucket, note = judge_whole(expected, outcome.received)
        else:
            bucket, note = judge_part(expected, outcome.received)
            if not note:
                return self._judge_error(request, outcome.error, was_replaced=len(allowed) > 1)
        if note and self._is_anothers(request, right, outcome.received):
            return Bucket.WRONG_ADAPTER, f"{note}; it is another adapter's"
        return bucket, note

    def _judge_error(
        self, request: Request, error: LoraServeError, *, was_replaced: bool
    ) -> tuple[Bucket, str]:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, OverloadedError):
            return Bucket.REFUSED, ""
        if isinstance(error, UnavailableError):
            if request.sampling.is_resumable and was_replaced and REPLACED in said:
                self.unavailable["replaced"] += 1
                return Bucket.ENDED_UNAVAILABLE, ""
            if request.sampling.is_resumable:
                self.unavailable["resumable"] += 1
                return Bucket.ENDED_UNAVAILABLE, said
            self.unavailable["not_resumable"] += 1
            return Bucket.ENDED_UNAVAILABLE, ""
        return Bucket.LOST, said

    def _is_anothers(self, request: Request, right: str, received: Received) -> bool:
        head = received.token_ids[:8]
        return len(head) > 1 and any(
            self._oracle.expected(version, request.prompt, request.sampling).token_ids[: len(head)] == head
            for version in self._versions.all_newest().values()
            if version != right
        )

    def _note(self, request: Request, outcome: Outcome, bucket: Bucket, note: str, seconds: float) -> None:
        if len(self.notes) < MAX_NOTES:
            at_s = time.monotonic() - self.begun_s
            self.notes.append(
                f"{at_s:.1f} s: {bucket}: request {request.serial} ({request.mode}, {request.kind},"
                f" {request.adapter}, {len(outcome.received.token_ids)} tokens, {outcome.attempts} attempts)"
                f" after {seconds:.1f} s: {note}"
            )


def _received(steps: Sequence[GenerationStep]) -> Received:
    return Received(
        token_ids=tuple(token for step in steps for token in step.token_ids),
        text="".join(step.text for step in steps),
        finishes=tuple(step.finish_reason.value for step in steps if step.finish_reason is not None),
    )
