"""Builders shared by the tests of the emulated engine."""

from pathlib import Path
from typing import Any

from loraserve.clock import Clock
from loraserve.config import EmulatedSection, EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles
from loraserve.engines.emulated import EmulatedEngine
from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.engines.virtual import VirtualTime
from loraserve.request import FinishReason, GenerationRequest, GenerationStep, SamplingParams
from placement.types import VersionId

FAST = EmulatedSection()


def engine_on(
    time: VirtualTime,
    emulated: EmulatedSection = FAST,
    *,
    clock: Clock | None = None,
    log: ReplicaLog | None = None,
    **settings: Any,
) -> EmulatedEngine:
    """An engine under virtual time; settings are EngineSection's."""
    section = EngineSection(kind="emulated", **settings)
    return EmulatedEngine(section, emulated, ModelSection(), clock=clock or time, sleep=time.sleep, log=log)


def adapter(name: str, rank: int = 8, size_bytes: int = 1000) -> AdapterFiles:
    """An adapter that needs no files."""
    return AdapterFiles(
        version_id=VersionId(f"{name}@0"), directory=Path("unused"), rank=rank, size_bytes=size_bytes
    )


def request(
    request_id: str,
    prompt: str | tuple[int, ...] = "hello",
    version: str | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """A request; sampling settings are SamplingParams'."""
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        version_id=None if version is None else VersionId(version),
        sampling=SamplingParams(**{"ignore_eos": True, **sampling}),
    )


async def collect(engine: EmulatedEngine, one: GenerationRequest) -> list[GenerationStep]:
    """All steps of a request."""
    return [step async for step in engine.generate(one)]


def tokens_of(steps: list[GenerationStep]) -> list[int]:
    """The whole answer's tokens."""
    return [token_id for step in steps for token_id in step.token_ids]


def text_of(steps: list[GenerationStep]) -> str:
    """The whole answer's text."""
    return "".join(step.text for step in steps)


def reason_of(steps: list[GenerationStep]) -> FinishReason | None:
    """How the answer ended."""
    return steps[-1].finish_reason
