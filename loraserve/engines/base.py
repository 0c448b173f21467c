"""The protocol between a replica and the engine that runs the model."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraserve.adapters.segment import AdapterSegment
from loraserve.errors import BadInputError
from loraserve.request import GenerationRequest, GenerationStep
from placement.profile import Slo
from placement.types import VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """A validated adapter: its files in the PEFT layout, where the controller's store keeps them, and its own
    targets, None for the usual ones. `digest` is the sha256 of its content, `head_sha256` that of the head of
    its segment; '' where nobody is to fetch it from a peer.

    `segment` is the adapter in shared memory, for engines that take it so; None: the engine reads
    `directory`. Who gives it keeps it open until the version is unloaded, and closes it.
    """

    version_id: VersionId
    directory: Path
    rank: int
    size_bytes: int
    slo: Slo | None = None
    digest: str = ""
    head_sha256: str = ""
    segment: AdapterSegment | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a started engine says of itself; `pids` are the processes it runs beside its caller.

    It holds up to `pool_adapters` adapters, and one batch up to `adapter_slots` different ones.
    `shares_processors`: it computes on the processors that its caller runs on.
    """

    kind: str
    base_model: str
    max_lora_rank: int
    adapter_slots: int
    pool_adapters: int
    max_model_len_tokens: int
    vocab_size: int
    pids: tuple[int, ...] = ()
    shares_processors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Requests running (in the batch) and waiting (queued), and the KV cache in use, 0 to 1."""

    running: int
    waiting: int
    kv_cache_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMemory:
    """What the slots of a worker hold: how many adapters are active, the bytes allocated, those of them that
    the adapters' true ranks fill, and what all slots take where each is padded to the highest rank. Bytes of
    0: not known."""

    active: int = 0
    allocated_bytes: int = 0
    used_bytes: int = 0
    padded_bytes: int = 0


class Engine(Protocol):
    """Runs the base model with adapters.

    Guarantees: a version is usable once `load_adapter` has returned and until `unload_adapter` is
    called; outputs of one request come in order and the last one carries a finish reason; closing
    or cancelling the iterator of `generate` aborts the request and releases all it held.
    Does not guarantee fairness, nor that `load` is newer than the last engine step. The caller must
    not unload what a running request names, and must not exceed `EngineInfo.pool_adapters`.
    """

    async def start(self) -> EngineInfo:
        """Bring the engine up; called once, on the loop that will use it."""
        ...

    async def load_adapter(self, adapter: AdapterFiles) -> None:
        """Make the version usable; AdapterRejectedError if the engine refuses it, with no trace left."""
        ...

    async def unload_adapter(self, version_id: VersionId) -> None:
        """Free what the version held; a version that is not loaded is no error."""
        ...

    async def resident(self) -> frozenset[VersionId]:
        """The versions that the engine itself says it holds."""
        ...

    def is_active(self, version_id: VersionId) -> bool:
        """Whether a request for the version may be computed at once, without a wait for one of the slots."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """Stream the request's steps; after `resumed_token_ids`, only what is new.

        Together with what was given out for those ids, the steps are the uninterrupted output: counts,
        limits and stops go on as if this engine had generated them. If they are the whole output already,
        one empty step says how it ended.

        BadInputError for a prompt the model cannot take, NotFoundError for a version that is not
        loaded, EngineDeadError when the engine is gone.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End the request, whose stream then finishes with ABORTED; an unknown id is no error."""
        ...

    def load(self) -> EngineLoad:
        """The engine's load now, without waiting."""
        ...

    def slot_memory(self) -> SlotMemory:
        """What the slots held when one of them last changed, without waiting."""
        ...

    async def check(self) -> None:
        """EngineDeadError if the engine cannot serve any more."""
        ...

    async def close(self) -> None:
        """Stop the engine and every process it started; safe to call twice."""
        ...


def check_resumed(request: GenerationRequest, vocab_size: int) -> None:
    """BadInputError if the request's output so far cannot be gone on with."""
    resumed = request.resumed_token_ids
    if not resumed:
        return
    if not request.sampling.is_resumable:
        raise BadInputError(
            f"resumed_token_ids: request {request.request_id} cannot be resumed: it has a seed, presence or "
            "frequency penalties, or logprobs"
        )
    if min(resumed) < 0 or max(resumed) >= vocab_size:
        raise BadInputError(f"resumed_token_ids: outside the vocabulary of {vocab_size} tokens")
