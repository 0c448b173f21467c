"""An engine without a model: paced by a latency model, saying deterministic tokens.

Owns the event loop's side of the pure batching model: one task that schedules a step, sleeps as long as
the step takes, and hands out what it drew. Adapters are names with a rank and a loading time.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from loraserve.clock import Clock
from loraserve.config import EmulatedSection, EngineSection, ModelSection
from loraserve.engines import batching
from loraserve.engines.base import AdapterFiles, EngineInfo, EngineLoad, SlotMemory, check_resumed
from loraserve.engines.emulated_process import StandInProcess
from loraserve.engines.emulated_slots import SlottedBatch
from loraserve.engines.outputs import Output
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
    ) -> None:
        kv_capacity_tokens = config.kv_cache_bytes // emulated.kv_bytes_per_token
        if kv_capacity_tokens < config.max_model_len_tokens:
            raise ConfigError(
                f"engine.kv_cache_bytes: holds {kv_capacity_tokens} tokens, less than one request of "
                f"engine.max_model_len_tokens = {config.max_model_len_tokens}; give at least "
                f"{config.max_model_len_tokens * emulated.kv_bytes_per_token} bytes"
            )
        self._config = config
        self._latency = emulated
        self._model = model
        self._clock = clock
        self._sleep = sleep
        self._batch = batching.Batch(
            batching.BatchLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                kv_capacity_tokens=kv_capacity_tokens,
            )
        )
        self._requests = SlottedBatch(self._batch, num_slots=config.adapter_slots)
        self._streams: dict[str, _Stream] = {}
        self._adapters: dict[VersionId, AdapterFiles] = {}
        self._loading: dict[VersionId, asyncio.Lock] = {}
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._process: StandInProcess | None = None
        self._dead: str | None = "the engine has not been started"
        self._renderer: PromptRenderer
        self._words: Sequence[int]

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
                    await self._sleep(adapter.size_bytes / self._latency.load_bytes_per_s)
                    self._check_alive()
                    self._adapters[version_id] = adapter
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
            self._requests.drop(version_id)

    async def resident(self) -> frozenset[VersionId]:
        """The versions loaded."""
        self._check_alive()
        return frozenset(self._adapters)

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
            self._requests.remove(request.request_id)

    async def abort(self, request_id: str) -> None:
        """Take the request out of the batch now; its stream ends with ABORTED."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._requests.remove(request_id)
            stream.output.abort()
            stream.news.set()

    def load(self) -> EngineLoad:
        """The batch's load now."""
        return EngineLoad(
            running=self._batch.num_running,
            waiting=self._batch.num_waiting + self._requests.num_outside,
            kv_cache_usage=self._batch.kv_usage,
        )

    def slot_memory(self) -> SlotMemory:
        """Not modelled."""
        return SlotMemory()

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
        self._requests.check_invariants()
        assert len(self._adapters) <= self._config.max_held_adapters, "more adapters than it may hold"
        members = {sequence.request_id for sequence in self._requests}
        assert members <= self._streams.keys(), "the batch runs a request that nobody reads"
        for request_id, stream in self._streams.items():
            ended = stream.output.finished or stream.error is not None
            assert ended == (request_id not in members), f"{request_id} is neither running nor ended"
            if not ended and stream.version_id is not None:
                assert stream.version_id in self._adapters, f"{request_id} runs without its adapter"

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
        stream = _Stream(output, version_id)
        self._streams[request.request_id] = stream
        if not output.finished:
            # The output so far is in no KV cache here: it is computed like a prompt.
            known_tokens = len(prompt_ids) + len(request.resumed_token_ids)
            rank = 0 if version_id is None else self._adapters[version_id].rank
            sequence = batching.Sequence(request_id=request.request_id, prompt_tokens=known_tokens, rank=rank)
            self._requests.add(sequence, version_id)
            self._work.set()
        return stream

    async def _run(self) -> None:
        try:
            await self._step_forever()
        except Exception as error:
            logging.getLogger(__name__).exception("the emulated engine failed")
            self._die(f"the engine failed: {error}")

    async def _step_forever(self) -> None:
        due_s = self._clock.now_s()
        while True:
            if len(self._batch) == 0:
                self._work.clear()
                await self._work.wait()
                due_s = self._clock.now_s()
            step = self._batch.schedule()
            due_s = max(due_s, self._clock.now_s() - MAX_LAG_S) + batching.step_time_s(step, self._latency)
            await self._sleep(max(0.0, due_s - self._clock.now_s()))
            for sequence in self._batch.commit(step):
                stream = self._streams[sequence.request_id]
                stream.output.extend()
                if stream.output.finished:
                    self._requests.remove(sequence.request_id)
                stream.news.set()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def _die(self, reason: str) -> None:
        self._dead = self._dead or reason
        for request_id, stream in self._streams.items():
            self._requests.remove(request_id)
            if not stream.output.finished and stream.error is None:
                stream.error = EngineDeadError(reason)
                stream.news.set()
