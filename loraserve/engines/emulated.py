"""An engine without a model: paced by a latency model, saying deterministic tokens.

Owns the event loop's side of the replica model, the same that the simulator runs: one task that sleeps
until its next step ends and hands out what was drawn. Adapters are names with a rank and a loading time.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from loraserve.clock import Clock
from loraserve.config import EmulatedSection, EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles, EngineInfo, EngineLoad, SlotMemory, check_resumed
from loraserve.engines.emulated_model import limits_of, step_cost_of
from loraserve.engines.emulated_process import StandInProcess
from loraserve.engines.outputs import Output
from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import Phase
from loraserve.engines.replica_model.sequence import Sequence as ModelSequence
from loraserve.engines.tokenizer import PromptRenderer
from loraserve.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    BadInputError,
    ConfigError,
    EngineDeadError,
    NotFoundError,
    OverloadedError,
    WorkFailedError,
)
from loraserve.request import GenerationRequest, GenerationStep
from placement.latency import PS_PER_S
from placement.types import VersionId

MAX_LAG_S = 0.1
"""How far the loop may fall behind its schedule before it forgets the rest: a busy machine then slows
the engine down instead of making it burst."""

MAX_REQUESTS = 16384
"""Requests held at once; a replica admits far fewer."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class _Stream:
    """One request between the loop task and its consumer."""

    output: Output
    version_id: VersionId | None
    sequence: ModelSequence
    given_tokens: int
    news: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None


class EmulatedEngine:
    """Implements `loraserve.engines.base.Engine`; a test or a drill may kill it with `crash`."""

    def __init__(
        self,
        config: EngineSection,
        emulated: EmulatedSection,
        model: ModelSection,
        *,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
        log: ReplicaLog | None = None,
    ) -> None:
        """`log` gets every step taken, for ever; without one nothing is kept."""
        self._config = config
        self._latency = emulated
        self._model = model
        self._clock = clock
        self._sleep = sleep
        # One step at a time, so that a request that stops by itself is out before the next one.
        self._replica = ReplicaModel(
            limits_of(config, emulated),
            step_cost_of(config, emulated),
            log=ReplicaLog.of_nothing() if log is None else log,
            max_run_steps=1,
        )
        self._origin_s = clock.now_s()
        """The clock at the model's zero; moved on when the loop falls behind."""
        self._num_requests = 0
        self._streams: dict[str, _Stream] = {}
        self._adapters: dict[VersionId, AdapterFiles] = {}
        self._loading: dict[VersionId, asyncio.Lock] = {}
        self._link = asyncio.Lock()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._process: StandInProcess | None = None
        self._dead: str | None = "the engine has not been started"
        self._renderer: PromptRenderer
        self._words: Sequence[int]

    @property
    def replica(self) -> ReplicaModel:
        """What computes here."""
        return self._replica

    async def start(self) -> EngineInfo:
        """Read the tokenizer, start the process if one is asked for, and begin to step."""
        self._renderer = await asyncio.to_thread(PromptRenderer.load, self._model.path)
        self._words = await asyncio.to_thread(self._renderer.clean_ids)
        if not self._words:
            raise ConfigError(f"model.path: the tokenizer of {self._model.path} has no plain tokens")
        if self._latency.engine_process:
            self._process = await StandInProcess.start(self.crash)
        self._dead = None
        self._task = asyncio.create_task(self._run(), name="emulated-engine")
        return EngineInfo(
            kind="emulated",
            base_model=self._model.path or "emulated",
            max_lora_rank=self._config.max_lora_rank,
            adapter_slots=self._config.adapter_slots,
            pool_adapters=self._config.max_held_adapters,
            max_model_len_tokens=self._config.max_model_len_tokens,
            vocab_size=self._renderer.vocab_size,
            pids=() if self._process is None else (self._process.pid,),
        )

    async def load_adapter(self, adapter: AdapterFiles) -> None:
        """Take the time that the adapter's bytes take; OverloadedError if it holds as many as it may."""
        self._check_alive()
        version_id = adapter.version_id
        if adapter.rank > self._config.max_lora_rank:
            raise AdapterRejectedError(
                f"{version_id}: rank {adapter.rank} is above engine.max_lora_rank = "
                f"{self._config.max_lora_rank}"
            )
        lock = self._loading.setdefault(version_id, asyncio.Lock())
        if version_id not in self._adapters and len(self._adapters.keys() | self._loading.keys()) > (
            self._config.max_held_adapters
        ):
            del self._loading[version_id]
            raise OverloadedError(
                f"{version_id}: the engine holds {self._config.max_held_adapters} adapters already, its most"
            )
        try:
            async with lock:
                if version_id not in self._adapters:
                    async with self._link:
                        await self._sleep(adapter.size_bytes / self._latency.load_bytes_per_s)
                    self._check_alive()
                    self._adapters[version_id] = adapter
                    self._replica.hold(version_id, adapter.rank, adapter.size_bytes, self._replica.now_ps)
        finally:
            self._loading.pop(version_id, None)

    async def unload_adapter(self, version_id: VersionId) -> None:
        """Let it go; WorkFailedError if a request still names the version, which callers must avoid."""
        users = sum(
            1
            for stream in self._streams.values()
            if stream.version_id == version_id and not stream.output.finished
        )
        if users:
            raise WorkFailedError(f"{version_id}: cannot be unloaded, {users} requests use it")
        if self._adapters.pop(version_id, None) is not None:
            self._replica.release(version_id, self._replica.now_ps)

    async def resident(self) -> frozenset[VersionId]:
        """The versions loaded."""
        self._check_alive()
        return frozenset(self._adapters)

    def is_active(self, version_id: VersionId) -> bool:
        """Whether the version has a slot that is not about to be given up."""
        return self._replica.gate.is_active(version_id)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """Stream the request's steps; what the consumer did not fetch in time comes merged."""
        stream = self._submit(request)
        try:
            while True:
                step = stream.output.take()
                if step is not None:
                    yield step
                    if step.finish_reason is not None:
                        return
                elif stream.error is not None:
                    raise stream.error
                else:
                    stream.news.clear()
                    await stream.news.wait()
        finally:
            self._streams.pop(request.request_id, None)
            self._replica.cancel(stream.sequence, self._replica.now_ps)

    async def abort(self, request_id: str) -> None:
        """Take the request out of the batch now; its stream ends with ABORTED."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._replica.cancel(stream.sequence, self._replica.now_ps)
            stream.output.abort()
            stream.news.set()

    def load(self) -> EngineLoad:
        """The batch's load now."""
        return EngineLoad(
            running=self._replica.running,
            waiting=self._replica.waiting + self._replica.coming,
            kv_cache_usage=self._replica.kv_usage,
        )

    def slot_memory(self) -> SlotMemory:
        """How many adapters have a slot; their memory is not modelled."""
        return SlotMemory(active=self._replica.gate.num_in_slots)

    async def check(self) -> None:
        """EngineDeadError if the loop task is gone."""
        self._check_alive()

    async def close(self) -> None:
        """Stop stepping and fail what still runs."""
        task, self._task = self._task, None
        process, self._process = self._process, None
        self._die("the engine was closed")
        if process is not None:
            await process.close()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def crash(self, reason: str = "crashed on request") -> None:
        """Die as a real engine might: every stream fails, and nothing more is served."""
        if self._task is not None:
            self._task.cancel()
        self._die(reason)

    def check_invariants(self) -> None:
        """AssertionError unless requests, tokens and slots are conserved."""
        replica = self._replica
        replica.check_invariants()
        assert len(self._adapters) <= self._config.max_held_adapters, "more adapters than it may hold"
        assert replica.gate.held == self._adapters.keys(), "the model holds other adapters"
        num_alive = 0
        for request_id, stream in self._streams.items():
            ended = stream.output.finished or stream.error is not None
            num_alive += not ended
            assert ended == (stream.sequence.phase is Phase.ENDED), (
                f"{request_id} is neither running nor ended"
            )
            if not ended and stream.version_id is not None:
                assert stream.version_id in self._adapters, f"{request_id} runs without its adapter"
        members = replica.running + replica.waiting + replica.coming
        assert members == num_alive, "the model runs a request that nobody reads"

    def _submit(self, request: GenerationRequest) -> _Stream:
        self._check_alive()
        version_id = request.version_id
        if version_id is not None and version_id not in self._adapters:
            raise NotFoundError(f"adapter version {version_id} is not loaded")
        if request.request_id in self._streams:
            raise AlreadyExistsError(f"request_id {request.request_id} is in use")
        if len(self._streams) >= MAX_REQUESTS:
            raise OverloadedError(f"the engine holds {MAX_REQUESTS} requests and takes no more")
        check_resumed(request, self._renderer.vocab_size)
        prompt_ids = self._renderer.prompt_ids(request.prompt)
        room = self._config.max_model_len_tokens - len(prompt_ids)
        if room < 1:
            raise BadInputError(
                f"prompt: {len(prompt_ids)} tokens leave no room for output; the model takes at most "
                f"{self._config.max_model_len_tokens} in all"
            )
        max_tokens = min(request.sampling.max_tokens, room)
        output = Output(request, prompt_ids, self._renderer, self._words, max_tokens)
        output.resume(request.resumed_token_ids)
        rank = 0 if version_id is None else self._adapters[version_id].rank
        # The output so far is in no KV cache here: it is computed like a prompt.
        num_drawn = len(request.resumed_token_ids)
        sequence = ModelSequence(
            self._num_requests, len(prompt_ids), max_tokens, rank, version_id, drawn=num_drawn
        )
        self._num_requests += 1
        stream = _Stream(output, version_id, sequence, num_drawn)
        if output.finished:
            sequence.phase = Phase.ENDED
        else:
            now_ps = round((self._clock.now_s() - self._origin_s) * PS_PER_S)
            sequence.owner = stream
            self._replica.submit(sequence, max(now_ps, self._replica.earliest_ps))
            self._work.set()
        self._streams[request.request_id] = stream
        return stream

    async def _run(self) -> None:
        try:
            await self._step_forever()
        except Exception as error:
            logging.getLogger(__name__).exception("the emulated engine failed")
            self._die(f"the engine failed: {error}")

    async def _step_forever(self) -> None:
        replica = self._replica
        while True:
            due_ps = replica.next_ps()
            if due_ps is None:
                self._work.clear()
                await self._work.wait()
                continue
            await self._sleep_until(due_ps, ends_step=due_ps == replica.step_end_ps)
            replica.advance(due_ps)
            self._give_out()
            # Now that who has stopped is out, the next step may begin. One of no time at all ends as well.
            replica.advance(due_ps + 1)
            if replica.finished:
                self._give_out()

    async def _sleep_until(self, due_ps: int, *, ends_step: bool) -> None:
        left_s = self._origin_s + due_ps / PS_PER_S - self._clock.now_s()
        if left_s < -MAX_LAG_S:
            self._origin_s -= left_s + MAX_LAG_S
            # Who has come by now would else come late by what was forgotten.
            self._replica.bring_forward(due_ps + round(MAX_LAG_S * PS_PER_S))
        # A step sleeps also without a moment to spare, for others share the event loop.
        if ends_step or left_s > 0:
            await self._sleep(max(0.0, left_s))

    def _give_out(self) -> None:
        """Hand each reader what was drawn since, and end what has stopped by itself."""
        replica = self._replica
        for sequence in (*replica.batch.running, *replica.finished):
            stream = sequence.owner
            assert isinstance(stream, _Stream)
            drawn = replica.drawn(sequence)
            if drawn == stream.given_tokens:
                continue
            while stream.given_tokens < drawn and not stream.output.finished:
                stream.output.extend()
                stream.given_tokens += 1
            if stream.output.finished:
                replica.cancel(sequence, replica.now_ps)
            stream.news.set()
        replica.finished.clear()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def _die(self, reason: str) -> None:
        self._dead = self._dead or reason
        for stream in self._streams.values():
            self._replica.cancel(stream.sequence, self._replica.now_ps)
            if not stream.output.finished and stream.error is None:
                stream.error = EngineDeadError(reason)
                stream.news.set()
