"""Measures one replica: the batches that the latency model is fitted to, then the load it bears per rank."""

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loraserve.config import Config
from loraserve.engines.base import EngineInfo
from loraserve.errors import WorkFailedError
from loraserve.profiling.batches import Batch, BatchLimits, RankedName, plan_batches
from loraserve.profiling.fit import Recommendation, TimedStep, recommend
from loraserve.profiling.load import LoadDriver, LoadShape
from loraserve.profiling.search import RateSearch, SearchLimits
from loraserve.profiling.stage import Stage, open_stage
from loraserve.profiling.subject import Subject
from loraserve.profiling.timing import LoadedAdapter, StepTimer
from placement.latency import LatencyModel
from placement.profile import LoadProbe, LoadSpeeds, Slo
from placement.steady_load import SteadyLoad, steady_tokens_per_s
from placement.types import VersionId

Watch = Callable[[tuple[int, ...]], Callable[[], float | None]]
"""Given the engine's processes, a function that tells the share of the processors' time since then that
went to neither them nor us."""

_WARM_UP_STEPS = 4
_START_SHARE = 0.8
_HIGHEST_PER_S = 1e5
_GRACE_S = 60.0
# A load is steady only after requests that came first have ended.
_REQUESTS_LONG = 6
_EXPECTED_PROBES = 7
_EXPECTED_SHARE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Every batch is timed `repetitions` times, as long as all have not taken `batches_s`, over
    `decode_steps` decode steps each; batches with adapters and more prompt tokens than one that took
    `step_limit_s` are left out. A probe of load lasts `probe_s`, at most `limit_s`; in real time one that
    fails is tried `tries` times in all, as another process may be to blame."""

    repetitions: int = 8
    batches_s: float = 90.0
    decode_steps: int = 12
    step_limit_s: float = 2.0
    probe_s: float = 20.0
    limit_s: float = 60.0
    tolerance: float = 0.05
    max_probes: int = 14
    tries: int = 2


QUICK = Effort(
    repetitions=2,
    batches_s=20.0,
    decode_steps=8,
    step_limit_s=0.7,
    probe_s=5.0,
    limit_s=15.0,
    tolerance=0.15,
    max_probes=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """How to measure; after `limit_s` of real time no further probe begins."""

    slo: Slo
    prompt_tokens: int
    output_tokens: int
    effort: Effort = field(default_factory=Effort)
    quick: bool = False
    seed: int = 0
    limit_s: float = math.inf

    def estimate_s(self, num_ranks: int) -> float:
        """About how long a run on a real engine takes."""
        effort = self.effort
        loads = (num_ranks + (num_ranks > 1)) * _EXPECTED_PROBES * effort.probe_s * _EXPECTED_SHARE
        return effort.batches_s + loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured; `highest` has the probe with the highest rate inside the SLO per rank (None:
    all ranks in turn), or None where no rate was; ranks that were not reached in time are not in it.
    `others_cpu` is the share of the processors' time that went to other work, None if it is not known."""

    info: EngineInfo
    steps: tuple[TimedStep, ...]
    left_out: tuple[str, ...]
    recommendation: Recommendation
    probes: tuple[LoadProbe, ...]
    highest: tuple[tuple[int | None, LoadProbe | None], ...]
    predicted_tokens_per_s: tuple[tuple[int, float], ...]
    speeds: LoadSpeeds
    took_s: float
    is_complete: bool = True
    others_cpu: float | None = None


@dataclass(slots=True)
class Progress:
    """How far the run is, 0 to 1, and what runs now."""

    share: float = 0.0
    doing: str = ""
    listeners: list[Callable[["Progress"], None]] = field(default_factory=list)

    def tell(self, doing: str, share: float | None = None) -> None:
        """Go on, and tell those who listen."""
        self.doing = doing
        self.share = self.share if share is None else min(1.0, share)
        for listener in self.listeners:
            listener(self)


async def run_profile(
    config: Config,
    subject: Subject,
    options: ProfileOptions,
    progress: Progress,
    *,
    watch: Watch = lambda _pids: lambda: None,
) -> Measured:
    """Start the engine, measure, and end it whatever happens; `watch` tells of other work meanwhile.

    The emulated engine runs in virtual time: what it takes is computed, not waited for.
    """
    began_s = time.perf_counter()
    progress.tell("the engine starts", 0.0)
    stage = open_stage(config, subject.model)
    try:
        info = await stage.engine.start()
        work = _Run(stage, info, config, subject, options, progress).measure()
        others_cpu = watch(info.pids)
        measured = await (work if stage.virtual is None else stage.virtual.run(work))
        share = others_cpu()
    finally:
        await stage.engine.close()
    return dataclasses.replace(measured, took_s=time.perf_counter() - began_s, others_cpu=share)


class _Run:
    """One measurement on a started engine."""

    def __init__(
        self,
        stage: Stage,
        info: EngineInfo,
        config: Config,
        subject: Subject,
        options: ProfileOptions,
        progress: Progress,
    ) -> None:
        self._stage = stage
        self._info = info
        self._config = config
        self._subject = subject
        self._options = options
        self._progress = progress
        self._began_s = time.perf_counter()
        searches = len(subject.ranks) + (len(subject.ranks) > 1)
        # The share of the run that the batches take, by the estimate.
        self._batches_share = options.effort.batches_s / options.estimate_s(len(subject.ranks))
        self._search_share = (1 - self._batches_share) / searches

    async def measure(self) -> Measured:
        """Load, time batches, fit, search."""
        speeds = await self._load_adapters()
        steps, left_out = await self._time_batches()
        recommendation = recommend(steps, self._config.engine.max_lora_rank)
        model = recommendation.best.model
        probes: list[LoadProbe] = []
        highest: list[tuple[int | None, LoadProbe | None]] = []
        predicted = [(rank, self._predicted(model, rank)) for rank in self._subject.ranks]
        for number, rank in enumerate(self._searched()):
            if self._is_over():
                break
            tried = await self._search(rank, model, number)
            probes += tried
            inside = [probe for probe in tried if probe.inside]
            highest.append((rank, max(inside, key=lambda probe: probe.requests_per_s, default=None)))
        return Measured(
            info=self._info,
            steps=tuple(steps),
            left_out=left_out,
            recommendation=recommendation,
            probes=tuple(probes),
            highest=tuple(highest),
            predicted_tokens_per_s=tuple(predicted),
            speeds=speeds,
            took_s=0.0,
            is_complete=not self._is_over(),
        )

    def _is_over(self) -> bool:
        return time.perf_counter() - self._began_s > self._options.limit_s

    def _searched(self) -> tuple[int | None, ...]:
        return (*self._subject.ranks, None) if len(self._subject.ranks) > 1 else self._subject.ranks

    async def _load_adapters(self) -> LoadSpeeds:
        began_s = self._stage.clock.now_s()
        for adapter in self._subject.adapters:
            self._progress.tell(f"loading {adapter.version_id.partition('@')[0]}")
            await self._stage.engine.load_adapter(adapter)
        took_s = self._stage.clock.now_s() - began_s
        size = sum(adapter.size_bytes for adapter in self._subject.adapters)
        return LoadSpeeds(host_to_gpu_bytes_per_s=size / max(took_s, 1e-6))

    async def _time_batches(self) -> tuple[list[TimedStep], tuple[str, ...]]:
        effort = self._options.effort
        named = {one.version_id.partition("@")[0]: one for one in self._subject.adapters}
        loaded = {
            name: LoadedAdapter(version_id=one.version_id, rank=one.rank) for name, one in named.items()
        }
        timer = StepTimer(
            self._stage.engine,
            loaded,
            self._stage.clock,
            vocab_size=self._info.vocab_size,
            seed=self._options.seed,
            timeout_s=_GRACE_S,
        )
        ranked = [RankedName(name=name, rank=one.rank) for name, one in loaded.items()]
        batches = plan_batches(ranked, self._limits(), quick=self._options.quick)
        rounds = _Rounds(timer, effort, self._progress, self._batches_share)
        return await rounds.run(batches)

    def _limits(self) -> BatchLimits:
        engine = self._config.engine
        return BatchLimits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len_tokens=self._info.max_model_len_tokens,
            adapter_slots=self._info.adapter_slots,
        )

    async def _search(self, rank: int | None, model: LatencyModel, number: int) -> list[LoadProbe]:
        effort, options = self._options.effort, self._options
        tokens = options.prompt_tokens + options.output_tokens
        predicted = self._predicted(model, rank or self._subject.ranks[-1])
        driver = self._driver(predicted, f"profile-{number}")
        of_rank = [one.version_id for one in self._subject.adapters if rank in (None, one.rank)]
        start = _START_SHARE * predicted / tokens
        limits = SearchLimits(
            lowest=1 / effort.limit_s,
            highest=_HIGHEST_PER_S,
            tolerance=effort.tolerance,
            max_probes=effort.max_probes,
        )
        search = RateSearch(limits, start)
        probes: list[LoadProbe] = []
        while (rate := search.next_rate) is not None and not self._is_over():
            share = self._batches_share + self._search_share * (number + min(0.9, len(probes) / 8))
            what = "all ranks" if rank is None else f"rank {rank}"
            self._progress.tell(f"load of {what}: {rate:.3g} requests/s", share)
            for _ in range(1 if self._stage.virtual else effort.tries):
                probes.append(await self._probe(driver, rate, of_rank, rank))
                if probes[-1].inside:
                    break
            search.tell(held=probes[-1].inside)
        return probes

    def _driver(self, predicted_tokens_per_s: float, name: str) -> LoadDriver:
        effort, options = self._options.effort, self._options
        # As many requests as run at once, of all their tokens: how long one takes when the batch is full.
        tokens = options.prompt_tokens + options.output_tokens
        request_s = self._rows() * tokens / predicted_tokens_per_s
        shape = LoadShape(
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            probe_s=min(effort.limit_s, max(effort.probe_s, _REQUESTS_LONG * request_s)),
            limit_s=effort.limit_s,
        )
        return LoadDriver(
            self._stage.engine,
            clock=self._stage.clock,
            sleep=self._stage.sleep,
            shape=shape,
            slo=options.slo,
            vocab_size=self._info.vocab_size,
            seed=options.seed,
            name=name,
        )

    async def _probe(
        self, driver: LoadDriver, rate: float, versions: Sequence[VersionId], rank: int | None
    ) -> LoadProbe:
        effort = self._options.effort
        limit_s = max(effort.probe_s, effort.limit_s) + self._options.slo.ttft_ms / 1e3 + _GRACE_S
        try:
            async with asyncio.timeout(limit_s):
                return await driver.probe(rate, versions, rank)
        except TimeoutError as error:
            raise WorkFailedError(f"a probe of {rate:g} requests/s did not end in {limit_s:g} s") from error

    def _predicted(self, model: LatencyModel, rank: int) -> float:
        """Where the model says that the replica saturates, by rows or by the KV cache."""
        options = self._options
        tokens = options.prompt_tokens + options.output_tokens
        held = self._config.engine.kv_cache_bytes // self._subject.kv_bytes_per_token
        rows = max(1, min(self._config.engine.max_num_seqs, held // tokens))
        load = SteadyLoad(rows=rows, prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens)
        return steady_tokens_per_s(model, load, rank)

    def _rows(self) -> int:
        tokens = self._options.prompt_tokens + self._options.output_tokens
        held = self._config.engine.kv_cache_bytes // self._subject.kv_bytes_per_token
        return max(1, min(self._config.engine.max_num_seqs, held // tokens))


class _Rounds:
    """Batches, each once per round, so that what drifts drifts for all of them."""

    def __init__(self, timer: StepTimer, effort: Effort, progress: Progress, share: float) -> None:
        self._timer = timer
        self._effort = effort
        self._progress = progress
        self._share = share
        self._too_long_tokens = float("inf")

    async def run(self, batches: Sequence[Batch]) -> tuple[list[TimedStep], tuple[str, ...]]:
        """A round to warm up, then the others; what was left out besides."""
        began_s = time.perf_counter()
        # Short prompts first: a long one that would take minutes is then left out unseen.
        ordered = sorted(batches, key=lambda batch: batch.prompt_tokens)
        steps: list[TimedStep] = []
        total = self._effort.repetitions + 1
        for number in range(total):
            for at, batch in enumerate(ordered):
                if self._is_too_long(batch) or (number > 1 and self._is_over(began_s)):
                    continue
                share = self._share * (number + at / len(ordered)) / total
                self._progress.tell(f"batch {batch.name}" + ("" if number else ", warm-up"), share)
                step = await self._timer.time(batch, self._effort.decode_steps if number else _WARM_UP_STEPS)
                if step is not None and step.ms > 1e3 * self._effort.step_limit_s and step.adapters:
                    self._too_long_tokens = min(self._too_long_tokens, max(1, batch.prompt_tokens))
                if step is not None and number:
                    steps.append(step)
        left_out = tuple(batch.name for batch in ordered if self._is_too_long(batch))
        if not steps:
            raise WorkFailedError("no batch could be timed: its sequences never ran side by side")
        return steps, left_out

    def _is_too_long(self, batch: Batch) -> bool:
        return bool(batch.adapters) and batch.prompt_tokens > self._too_long_tokens

    def _is_over(self, began_s: float) -> bool:
        return time.perf_counter() - began_s > self._effort.batches_s
