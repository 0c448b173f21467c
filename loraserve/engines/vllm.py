"""The engine protocol over vLLM's AsyncLLM: the same code on CUDA and on the CPU.

Owns the engine's life and its requests. vLLM and torch are imported on the way into `start`, in the process
that runs the engine, and off its event loop.
"""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import tempfile
import traceback
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

from loraserve.config import EngineSection, LoraExecution, ModelSection
from loraserve.engines.base import AdapterFiles, EngineInfo, EngineLoad, SlotMemory, check_resumed
from loraserve.engines.vllm_arguments import (
    check_extra,
    check_known,
    engine_arguments,
    engine_environment,
    environment_set,
    few_rows_library,
    lora_execution,
)
from loraserve.engines.vllm_outputs import LoadRecorder
from loraserve.engines.vllm_pool import EnginePool
from loraserve.engines.vllm_processes import EngineProcesses, engine_children, kill_pids, with_descendants
from loraserve.engines.vllm_prompts import PromptEncoder
from loraserve.engines.vllm_resume import vllm_work
from loraserve.engines.vllm_slots import AdapterSlots
from loraserve.errors import (
    AlreadyExistsError,
    BadInputError,
    ConfigError,
    EngineDeadError,
    LoraServeError,
    NotFoundError,
    WorkFailedError,
)
from loraserve.request import GenerationRequest, GenerationStep
from placement.types import VersionId

_SHUTDOWN_S = 5.0
_KILL_S = 5.0
_START_POLL_S = 0.05


@dataclass(slots=True)
class _Started:
    """All that exists only while the engine runs."""

    client: Any
    info: EngineInfo
    prompts: PromptEncoder
    adapters: AdapterSlots | EnginePool
    processes: EngineProcesses


@dataclass(slots=True)
class _InFlight:
    """A request from admission to the end of its stream."""

    lora: Any | None
    aborted: bool = False


class VllmEngine:
    """One vLLM engine in a child process, which ends with `parent_pid` (default: this process).

    A prompt must leave room for one output token; an output that reaches the model's length ends there
    with LENGTH, whatever `max_tokens` asks for. A step carries what one engine step added, or several
    steps together when the consumer is slower than the engine. `logprobs` list the chosen token first,
    then the likeliest in order. `load` counts exactly what is in flight here; how much of it runs, and
    the KV cache in use, are the scheduler's figures at the end of its last step.
    """

    def __init__(self, model: ModelSection, engine: EngineSection, *, parent_pid: int | None = None) -> None:
        if not model.path:
            raise ConfigError("model.path: the vLLM engine needs a model folder or a Hugging Face id")
        check_extra(engine.extra)
        self._model = model
        self._engine = engine
        self._parent_pid = os.getpid() if parent_pid is None else parent_pid
        self._recorder = LoadRecorder()
        self._in_flight: dict[str, _InFlight] = {}
        self._starting: asyncio.Future[Any] | None = None
        self._children_before: frozenset[int] = frozenset()
        self._temp_dir = ""
        self._execution: LoraExecution = engine.lora_execution
        self._started: _Started | None = None
        self._closing: asyncio.Future[None] | None = None

    async def start(self) -> EngineInfo:
        """Bring the engine up; called once, on the loop that will use it.

        ConfigError for what vLLM does not accept, WorkFailedError if it does not come up. Cancelling it
        ends what was started.
        """
        if self._starting is not None or self._closing is not None:
            raise WorkFailedError("this engine was started before; make a new one")
        self._children_before = engine_children()
        self._temp_dir = tempfile.mkdtemp(prefix="vllm-")
        # vLLM blocks for seconds while its process comes up: not on this loop.
        self._starting = asyncio.ensure_future(asyncio.to_thread(self._construct))
        try:
            client = await asyncio.shield(self._starting)
            self._started = await self._attach(client)
        except BaseException:
            await self.close()
            raise
        return self._started.info

    async def load_adapter(self, adapter: AdapterFiles) -> None:
        """Make the version usable; done when every worker rank lists it."""
        await self._running().adapters.load(adapter)

    async def unload_adapter(self, version_id: VersionId) -> None:
        """Free what the version held; StaleError while a request of this engine uses it."""
        await self._running().adapters.unload(version_id)

    async def resident(self) -> frozenset[VersionId]:
        """The versions that every worker rank lists."""
        return await self._running().adapters.resident()

    def is_active(self, version_id: VersionId) -> bool:
        """Whether the version has a slot that is not about to be given up."""
        return self._running().adapters.is_active(version_id)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """Stream the request's steps; closing or cancelling the stream aborts it in vLLM."""
        started = self._running()
        from vllm.inputs.engine import tokens_input

        entry = self._admit(started, request)
        finished = False
        try:
            with _translated(request.request_id):
                check_resumed(request, started.info.vocab_size)
                prompt_ids = await started.prompts.encode(request.prompt)
                work = vllm_work(started.client, request, prompt_ids)
                # What is over already waits for no slot.
                over = entry.aborted or work.ended is not None
                entered = over or await self._enter(started, request)
                # Nothing pauses between this and the first step of the stream, when vLLM knows of it.
                only = work.aborted() if entry.aborted or not entered else work.ended
                if only is not None:
                    finished = True
                    yield only
                    return
                stream = started.client.generate(
                    tokens_input(work.token_ids),
                    work.sampling,
                    request.request_id,
                    lora_request=entry.lora,
                )
                async with contextlib.aclosing(stream):
                    async for output in stream:
                        step = work.step(output)
                        finished = step.finish_reason is not None
                        yield step
                        if finished and not output.finished:
                            break  # vLLM does not know of this end: closing the stream aborts the rest
        finally:
            try:
                if not finished:
                    await self._abort_in_vllm(started, (request.request_id,))
            finally:
                # Also if the abort is cancelled: what it holds must not stay for ever.
                self._release(started, request)

    async def abort(self, request_id: str) -> None:
        """End the request, whose stream then finishes with ABORTED; an unknown id is no error."""
        entry = self._in_flight.get(request_id)
        if entry is not None and self._started is not None:
            entry.aborted = True
            self._started.adapters.give_up(request_id)
            await self._abort_in_vllm(self._started, (request_id,))

    def load(self) -> EngineLoad:
        """The requests in flight and the KV cache in use, without waiting."""
        return self._recorder.load(len(self._in_flight))

    def slot_memory(self) -> SlotMemory:
        """What the slots held when one of them last changed, without waiting."""
        return SlotMemory() if self._started is None else self._started.adapters.memory

    async def check(self) -> None:
        """EngineDeadError if vLLM says so or one of its processes has ended."""
        started = self._running()
        ended = set(started.processes.pids) - set(started.processes.alive())
        if started.client.errored or ended:
            what = f"process {min(ended)} has ended" if ended else "it takes no more requests"
            raise EngineDeadError(f"the vLLM engine is gone: {what}")

    async def close(self) -> None:
        """Stop the engine and every process it started, within about ten seconds; safe to call twice."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    def _construct(self) -> Any:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError(f"engine.kind: vllm cannot be imported here: {error}") from error

        on_cpu = current_platform.is_cpu()
        check_known(self._engine.extra, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
        execution = self._execution = lora_execution(self._engine)
        environment = engine_environment(
            self._engine,
            self._parent_pid,
            on_cpu=on_cpu,
            execution=execution,
            library=few_rows_library() if on_cpu and execution in ("rank-true", "padded") else "",
        )
        # vLLM deletes neither its sockets nor its rendezvous file: they go with this folder.
        environment |= {"VLLM_RPC_BASE_PATH": self._temp_dir, "TMPDIR": self._temp_dir}
        with environment_set(environment):
            try:
                values = engine_arguments(self._model, self._engine, on_cpu=on_cpu, execution=execution)
                arguments = AsyncEngineArgs(**values)
                config = arguments.create_engine_config()
            except (ValueError, TypeError, OSError) as error:
                raise ConfigError(f"engine: vLLM refuses the configuration: {_reason(error)}") from error
            try:
                return AsyncLLM.from_vllm_config(
                    config,
                    stat_loggers=[self._recorder.factory],
                    enable_log_requests=arguments.enable_log_requests,
                    disable_log_stats=True,
                )
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold vLLM's sockets and threads
                raise WorkFailedError(f"vLLM did not start: {_reason(error)}") from error

    async def _attach(self, client: Any) -> _Started:
        from vllm.platforms import current_platform

        processes = EngineProcesses(with_descendants(sorted(engine_children() - self._children_before)))
        model_config = client.model_config
        held = self._engine.held_with(self._execution)
        info = EngineInfo(
            kind="vllm",
            base_model=self._model.path,
            max_lora_rank=self._engine.max_lora_rank,
            adapter_slots=min(held, self._engine.adapter_slots),
            pool_adapters=held,
            max_model_len_tokens=model_config.max_model_len,
            vocab_size=model_config.get_vocab_size(),
            pids=processes.pids,
            shares_processors=current_platform.is_cpu(),
        )
        # From here on vLLM's reader runs on this loop; it also asks once what `generate` needs to know.
        await client.get_supported_tasks()
        prompts = PromptEncoder(
            client.get_tokenizer(),
            max_model_len_tokens=info.max_model_len_tokens,
            vocab_size=info.vocab_size,
        )
        return _Started(
            client=client,
            info=info,
            prompts=prompts,
            adapters=self._adapters(client),
            processes=processes,
        )

    def _adapters(self, client: Any) -> AdapterSlots | EnginePool:
        held, rank = self._engine.held_with(self._execution), self._engine.max_lora_rank
        if self._execution in ("stock", "off"):
            return AdapterSlots(client, num_slots=held, max_lora_rank=rank)
        return EnginePool(
            client,
            num_slots=self._engine.adapter_slots,
            num_adapters=held,
            max_lora_rank=rank,
            num_requests=lambda: len(self._in_flight),
        )

    def _running(self) -> _Started:
        if self._started is None or self._closing is not None:
            raise EngineDeadError(f"the vLLM engine is {'closed' if self._closing else 'not started'}")
        return self._started

    def _admit(self, started: _Started, request: GenerationRequest) -> _InFlight:
        if request.request_id in self._in_flight:
            raise AlreadyExistsError(f"request {request.request_id}: a request of this id is in flight")
        lora = None
        if request.version_id is not None:
            lora = started.adapters.pin(request.version_id)
            if lora is None:
                raise NotFoundError(f"adapter {request.version_id}: not loaded in this engine")
        entry = self._in_flight[request.request_id] = _InFlight(lora)
        return entry

    async def _enter(self, started: _Started, request: GenerationRequest) -> bool:
        if request.version_id is None:
            return True
        return await started.adapters.enter(request.version_id, request.request_id)

    def _release(self, started: _Started, request: GenerationRequest) -> None:
        del self._in_flight[request.request_id]
        if request.version_id is not None:
            started.adapters.leave(request.version_id, request.request_id)
            started.adapters.unpin(request.version_id)

    async def _abort_in_vllm(self, started: _Started, request_ids: tuple[str, ...]) -> None:
        if not started.client.errored:
            with contextlib.suppress(Exception):  # an engine that dies now holds no request either
                await started.client.abort(list(request_ids))

    async def _close(self) -> None:
        if self._starting is None:
            return
        try:
            await self._end(self._starting)
        finally:
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    async def _end(self, starting: "asyncio.Future[Any]") -> None:
        while not starting.done():
            # The thread cannot be stopped, but it gives up at once when its process has gone.
            kill_pids(engine_children() - self._children_before)
            await asyncio.wait({starting}, timeout=_START_POLL_S)
        if starting.cancelled() or starting.exception() is not None:
            kill_pids(engine_children() - self._children_before)
            return
        await self._stop(starting.result())

    async def _stop(self, client: Any) -> None:
        started = self._started
        pids = with_descendants(sorted(engine_children() - self._children_before))
        processes = EngineProcesses(pids) if started is None else started.processes
        if started is not None:
            # vLLM may wait without end for requests that run when it is told to stop.
            await self._abort_in_vllm(started, tuple(self._in_flight))
            started.prompts.close()
        await _stop_reader(client)
        shutdown = asyncio.ensure_future(asyncio.to_thread(_shut_down, client))
        await asyncio.wait({shutdown}, timeout=_SHUTDOWN_S)
        processes.kill()
        await processes.wait(_KILL_S)
        processes.close()
        if started is not None:
            started.adapters.close()
        await asyncio.wait({shutdown}, timeout=_KILL_S)
        if shutdown.done():
            shutdown.exception()


def _shut_down(client: Any) -> None:
    client.shutdown(_SHUTDOWN_S)
    # vLLM closes its sockets and forgets their context, which keeps two threads.
    client.engine_core.resources.ctx.destroy(linger=0)


async def _stop_reader(client: Any) -> None:
    """End vLLM's reader, which would take the end of its process for a crash and log a traceback."""
    reader = client.output_handler
    if reader is not None:
        reader.cancel()
        await asyncio.wait({reader}, timeout=_SHUTDOWN_S)


@contextlib.contextmanager
def _translated(request_id: str) -> Iterator[None]:
    """vLLM's errors as ours."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
    from vllm.v1.engine.exceptions import EngineGenerateError

    try:
        yield
    except LoraServeError:
        raise
    except VllmEngineDeadError as error:
        raise EngineDeadError(f"request {request_id}: the vLLM engine is gone") from error
    except VLLMClientError as error:
        raise BadInputError(f"request {request_id}: {error}") from error
    except EngineGenerateError as error:
        raise WorkFailedError(f"request {request_id}: vLLM failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The error that began it, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text or type(error).__name__
