"""A started vLLM engine with the sample adapters, as its tests ask it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm import VllmEngine
from loraserve.engines.vllm_pool import EnginePool
from loraserve.request import ChatTurn, GenerationRequest, GenerationStep, SamplingParams
from loraserve.samples import SampleSet
from placement.slots.machine import SlotSnapshot
from placement.types import VersionId

MAX_TOKENS = 24
PROMPTS = (
    "The boat left the harbour before",
    "A computer counts",
    "In the morning the market was full of people who wanted to buy",
    "Water",
    # Longer than what the kernel for few rows takes, and than a block of the prefix cache.
    "In the morning the market was full of people who wanted to buy. " * 10,
)


def running_pids(pids: Iterable[int]) -> list[int]:
    """Those of the processes that exist."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def files_left(engine: VllmEngine) -> bool:
    """Whether the engine's temporary files outlive it."""
    return Path(engine._temp_dir).exists()


Prompt = str | tuple[int, ...] | tuple[ChatTurn, ...]


@dataclass
class Answer:
    """All steps of one request, put together."""

    steps: list[GenerationStep] = field(default_factory=list)

    @property
    def last(self) -> GenerationStep:
        return self.steps[-1]

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)


class Bench:
    """The engine under test with the sample adapters, all of its slots taken."""

    def __init__(self, engine: VllmEngine, samples: SampleSet, start_s: float) -> None:
        self.engine = engine
        self.samples = samples
        self.start_s = start_s
        self.versions = {name: VersionId(f"{name}@0123456789abcdef") for name in samples.adapters}
        self._requests = 0

    def files(self, name: str, version: str | None = None) -> AdapterFiles:
        """A sample adapter's files, by default under its usual version."""
        return AdapterFiles(
            version_id=VersionId(version) if version else self.versions[name],
            directory=self.samples.adapters[name],
            rank=int(name.removeprefix("rank-")),
            size_bytes=1,
        )

    def request(
        self,
        prompt: Prompt = PROMPTS[0],
        adapter: str | None = None,
        **sampling: object,
    ) -> GenerationRequest:
        """A greedy request; `adapter` is a sample's name."""
        self._requests += 1
        values = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | sampling
        return GenerationRequest(
            request_id=f"request-{self._requests}",
            prompt=prompt,
            version_id=self.versions[adapter] if adapter else None,
            sampling=SamplingParams(**values),  # type: ignore[arg-type]
        )

    async def answer(self, request: GenerationRequest) -> Answer:
        """Run the request to its end."""
        answer = Answer()
        async for step in self.engine.generate(request):
            answer.steps.append(step)
        return answer

    async def ask(
        self, prompt: Prompt = PROMPTS[0], adapter: str | None = None, **sampling: object
    ) -> Answer:
        """Run one greedy request to its end."""
        return await self.answer(self.request(prompt, adapter, **sampling))

    @property
    def slots(self) -> SlotSnapshot:
        """The engine's slots and who waits for one."""
        adapters = self.engine._running().adapters
        assert isinstance(adapters, EnginePool)
        return adapters._table.snapshot()
