"""Runs `bench rank`: one engine after the other, its rows in turn, each until its share of time is used."""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from loraserve.bench.idle import Bystanders
from loraserve.bench.rank_figures import Spread, spread
from loraserve.bench.rank_rows import Mode, Row, RowSet, Sizes, plan_rows
from loraserve.bench.rank_subject import Subject
from loraserve.bench.rank_timing import Sample, Timer
from loraserve.config import Config, EngineSection, parse_config
from loraserve.engines.base import Engine
from loraserve.engines.factory import make_engine

ADAPTER_SLOTS = 4
KV_CACHE_BYTES = 256 * 1024**2
_TWICE: tuple[Mode, ...] = ("off", "rank-true")
_WARM_UP_TOKENS = 8
_SPARE_TOKENS = 16
_SPARE_SEQUENCES = 2
# Every prompt is computed, and what shows the run's progress has the terminal to itself.
_VLLM_EXTRA = {"enable_prefix_caching": False, "use_tqdm_on_load": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """In each engine a row is repeated `repetitions` times, or until it has taken `row_s` seconds, but one
    of the lowest or of the highest rank alone at least `least` times. With `mirrored` the modes that every
    figure rests on run again at the end, in the reverse order, so that a machine that gets slower or faster
    does so for both."""

    repetitions: int = 10
    row_s: float = 1.5
    least: int = 2
    mirrored: bool = True


QUICK = Effort(repetitions=6, row_s=0.5, least=1, mirrored=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """What to measure, and how."""

    modes: tuple[Mode, ...]
    sizes: Sizes = field(default_factory=Sizes)
    effort: Effort = field(default_factory=Effort)
    quick: bool = False
    engine: str = "vllm"
    dtype: str = "bfloat16"
    max_lora_rank: int = 128
    seed: int = 0

    def config(self, mode: Mode, model: str) -> Config:
        """The engine's configuration; ConfigError for values that it cannot have."""
        longest = max(self.sizes.prompt_tokens, self.sizes.decode_prompt_tokens + self.sizes.output_tokens)
        section = {
            "kind": self.engine,
            "max_lora_rank": self.max_lora_rank,
            "adapter_slots": ADAPTER_SLOTS,
            "max_num_seqs": self.sizes.sequences + _SPARE_SEQUENCES,
            "max_model_len_tokens": longest + _SPARE_TOKENS,
            "max_num_batched_tokens": 2 * longest,
            "kv_cache_bytes": KV_CACHE_BYTES,
            "lora_execution": mode,
            "extra": dict(_VLLM_EXTRA) if self.engine == "vllm" else {},
        }
        return parse_config({"model": {"path": model, "dtype": self.dtype}, "engine": section})


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRun:
    """A row and its repetitions, in the order in which they ran."""

    row: Row
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """All that one engine was measured at; `others_cpu` is the share of the processors' time that went to
    other work meanwhile, None where it cannot be known."""

    mode: Mode
    engine: EngineSection
    start_s: float
    took_s: float
    others_cpu: float | None
    rows: tuple[RowRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """The engines' runs in the order of time."""

    subject: Subject
    engines: tuple[EngineRun, ...]

    @property
    def times(self) -> dict[str, dict[str, Spread]]:
        """mode → row → its median and spread, over all engines of the mode."""
        samples: dict[str, dict[str, list[float]]] = {}
        for run in self.engines:
            of_mode = samples.setdefault(run.mode, {})
            for one in run.rows:
                of_mode.setdefault(one.row.name, []).extend(sample.ms for sample in one.samples)
        return {mode: {row: spread(taken) for row, taken in rows.items()} for mode, rows in samples.items()}


@dataclass(slots=True)
class Progress:
    """How far the run is: of `total` repetitions at most, `done`; `doing` says what runs now."""

    total: int = 0
    done: int = 0
    doing: str = ""
    listeners: list[Callable[["Progress"], None]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """How far it is, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    def tell(self, *, done: int = 0, doing: str = "") -> None:
        """Go on, and tell those who listen."""
        self.done += done
        self.doing = doing or self.doing
        for listener in self.listeners:
            listener(self)


async def run_rank(subject: Subject, options: RankOptions, progress: Progress) -> RankResult:
    """Measure every mode; what is started is ended whatever happens."""
    plans = {
        mode: plan_rows(mode, subject.adapters, options.sizes, num_slots=ADAPTER_SLOTS, quick=options.quick)
        for mode in options.modes
    }
    again = [mode for mode in reversed(options.modes) if mode in _TWICE and options.effort.mirrored]
    order = [*options.modes, *again]
    progress.total = sum(len(one.rows) for mode in order for one in plans[mode]) * options.effort.repetitions
    engines = [await _run_engine(mode, plans[mode], subject, options, progress) for mode in order]
    return RankResult(subject=subject, engines=tuple(engines))


async def _run_engine(
    mode: Mode, sets: Sequence[RowSet], subject: Subject, options: RankOptions, progress: Progress
) -> EngineRun:
    config = options.config(mode, str(subject.model))
    progress.tell(doing=f"{mode}: the engine starts")
    began_s = time.perf_counter()
    engine = make_engine(config)
    try:
        info = await engine.start()
        start_s = time.perf_counter() - began_s
        versions = {name: files.version_id for name, files in subject.files.items()}
        timer = Timer(engine, versions, vocab_size=info.vocab_size, seed=options.seed)
        outer = {f"r{rank}" for rank in (subject.ranks[0], subject.ranks[-1])}
        rounds = _Rounds(mode, timer, options.effort, outer, progress)
        runs: list[RowRun] = []
        bystanders = Bystanders(info.pids)
        for one in sets:
            await _load(engine, one.loaded, subject)
            runs += await rounds.run(one.rows)
            await _unload(engine, one.loaded, subject)
        others_cpu = bystanders.share()
    finally:
        await engine.close()
    took_s = time.perf_counter() - began_s
    return EngineRun(
        mode=mode,
        engine=config.engine,
        start_s=start_s,
        took_s=took_s,
        others_cpu=others_cpu,
        rows=tuple(runs),
    )


async def _load(engine: Engine, names: Sequence[str], subject: Subject) -> None:
    for name in names:
        await engine.load_adapter(subject.files[name])


async def _unload(engine: Engine, names: Sequence[str], subject: Subject) -> None:
    for name in names:
        await engine.unload_adapter(subject.files[name].version_id)


class _Rounds:
    """Rows of one engine, each once per round, so that what drifts drifts for all of them."""

    def __init__(
        self, mode: Mode, timer: Timer, effort: Effort, outer: Collection[str], progress: Progress
    ) -> None:
        self._mode = mode
        self._timer = timer
        self._effort = effort
        self._outer = outer
        self._progress = progress

    async def run(self, rows: Sequence[Row]) -> list[RowRun]:
        """Warm every row up, then measure."""
        for row in rows:
            self._progress.tell(doing=f"{self._mode}: warm-up, {row.name}")
            await self._timer.time(self._warm_up_of(row))
        samples: dict[str, list[Sample]] = {row.name: [] for row in rows}
        taken_s = dict.fromkeys(samples, 0.0)
        for _ in range(self._effort.repetitions):
            for row in rows:
                if not self._is_enough(row, len(samples[row.name]), taken_s[row.name]):
                    self._progress.tell(doing=f"{self._mode}: {row.name}")
                    began_s = time.perf_counter()
                    samples[row.name].append(await self._timer.time(row))
                    taken_s[row.name] += time.perf_counter() - began_s
                self._progress.tell(done=1)
        return [RowRun(row=row, samples=tuple(samples[row.name])) for row in rows]

    def _is_enough(self, row: Row, repetitions: int, taken_s: float) -> bool:
        least = self._effort.least if row.batch in self._outer else 1
        return repetitions >= least and taken_s >= self._effort.row_s

    def _warm_up_of(self, row: Row) -> Row:
        output = min(row.output_tokens, _WARM_UP_TOKENS)
        # vLLM's own execution takes seconds for a whole prompt, token after token: a few of them will do.
        prompt = min(row.prompt_tokens, _WARM_UP_TOKENS) if self._mode == "stock" else row.prompt_tokens
        return dataclasses.replace(row, prompt_tokens=prompt, output_tokens=output)
