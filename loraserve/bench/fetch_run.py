"""Runs `bench fetch`: one adapter after the other, its sources in turn, in two processes beside this one."""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loraserve.adapters.files import WEIGHTS_FILE
from loraserve.bench.fetch_figures import FetchRow, Source, spread_s
from loraserve.bench.fetch_pages import drop_pages, share_in_memory
from loraserve.bench.fetch_processes import WorkerProcess, wanted_tree, worker
from loraserve.bench.fetch_subject import FetchSubject, Shape, made, show_size
from loraserve.bench.idle import Bystanders
from loraserve.errors import LoraServeError, WorkFailedError

HOST = "127.0.0.1"
COLD_SHARE = 0.01
"""A file of which more than this is in memory is not cold."""
_SPARE_BYTES = 64 * 1024**2
_MEMORY_COPIES = 4
"""A size is in memory so often: at the holder, at the fetcher (twice while one is being let go of), and as
the folder's pages."""
_FLOOR_BYTES = 32 * 1024**2
_FLOOR_TIMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """What to measure: each source of each adapter `repetitions` times, or until it has taken `row_s` seconds
    but at least `least` times. `engine` is the configuration of one to make adapters active in."""

    shapes: tuple[Shape, ...]
    sources: tuple[Source, ...]
    repetitions: int = 9
    row_s: float = 6.0
    least: int = 3
    engine: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchResult:
    """All rows in order; `left_out` says in one line each why a source has none, `samples` has every time."""

    rows: tuple[FetchRow, ...]
    left_out: Mapping[str, str]
    samples: Sequence[Mapping[str, Any]]
    floors: Mapping[str, float]
    others_cpu: float | None
    took_s: float


@dataclass(slots=True)
class FetchProgress:
    """How far the run is: of `total` repetitions at most, `done`; `doing` says what runs now."""

    total: int = 0
    done: int = 0
    doing: str = ""
    listeners: list[Callable[["FetchProgress"], None]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """How far it is, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def tell(self, *, done: int = 0, doing: str = "") -> None:
        """Go on, and tell those who listen."""
        self.done += done
        self.doing = doing or self.doing
        for listener in self.listeners:
            listener(self)


async def run_fetch(options: FetchOptions, folder: Path, progress: FetchProgress) -> FetchResult:
    """Measure everything with files in `folder`; what is started is ended. LoraServeError, also if no
    source could be measured."""
    _check_memory(options.shapes)
    progress.total = len(options.shapes) * len(options.sources) * options.repetitions
    progress.tell(doing="the processes start")
    began_s = time.perf_counter()
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(worker("holding process", folder))
        fetcher = await stack.enter_async_context(worker("fetching process", folder))
        bench = _Bench(options, holder, fetcher, progress)
        pids = await bench.open()
        bystanders = Bystanders(pids)
        for shape in options.shapes:
            progress.tell(doing=f"{shape.label}: the adapter is written")
            with made(shape, folder) as subject:
                await bench.measure(subject)
        others_cpu = bystanders.share()
        if not bench.rows:
            why = "; ".join(f"{source}: {reason}" for source, reason in bench.left_out.items())
            raise WorkFailedError(f"nothing was measured: {why}")
        floors = await asyncio.to_thread(measure_floors)
    return FetchResult(
        rows=tuple(bench.rows),
        left_out=bench.left_out,
        samples=bench.samples,
        floors=floors,
        others_cpu=others_cpu,
        took_s=time.perf_counter() - began_s,
    )


def measure_floors() -> dict[str, float]:
    """What one core of this machine can do, in bytes/s: copy memory, and work out the sha256 that every
    segment must have before it is resident."""
    source, target = bytearray(_FLOOR_BYTES), bytearray(_FLOOR_BYTES)

    def copy() -> None:
        target[:] = source

    def digest() -> None:
        hashlib.sha256(source).digest()

    return {"memcpy_bytes_per_s": _rate(copy), "sha256_bytes_per_s": _rate(digest)}


def _rate(work: Callable[[], None]) -> float:
    taken = []
    for _ in range(_FLOOR_TIMES):
        began_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began_s)
    return _FLOOR_BYTES / median(taken)


class _Bench:
    """Both processes, and what was measured with them."""

    def __init__(
        self, options: FetchOptions, holder: WorkerProcess, fetcher: WorkerProcess, progress: FetchProgress
    ) -> None:
        self._options = options
        self._holder = holder
        self._fetcher = fetcher
        self._progress = progress
        self._addresses: dict[str, str] = {}
        self.rows: list[FetchRow] = []
        self.samples: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    async def open(self) -> list[int]:
        """Bring both up; the ids of all processes that take part."""
        largest = max(shape.body_bytes for shape in self._options.shapes)
        schemes = [one for one in self._options.sources if one in ("ucx", "tcp")]
        what = {"host": HOST, "schemes": schemes, "capacity_bytes": largest + largest // 8 + _SPARE_BYTES}
        ends = [await one.ask("open", **what) for one in (self._holder, self._fetcher)]
        for end in ends:
            self.left_out |= end["left_out"]
        self._addresses = ends[0]["addresses"]
        pids = [self._holder.pid, self._fetcher.pid]
        if self._options.engine is not None:
            self._progress.tell(doing="the engine starts")
            pids += (await self._fetcher.ask("start_engine", config=dict(self._options.engine)))["pids"]
        return pids

    async def measure(self, subject: FetchSubject) -> None:
        """All sources of one adapter in turn, each round in another order."""
        label, options = subject.shape.label, self._options
        await self._holder.ask("hold", wanted=wanted_tree(subject, directory=subject.stored))
        sources = [one for one in options.sources if one not in self.left_out]
        taken: dict[Source, list[dict[str, Any]]] = {one: [] for one in sources}
        try:
            for number in range(-1, options.repetitions):
                first = number % max(1, len(sources))
                for source in sources[first:] + sources[:first]:
                    if source in self.left_out or self._is_enough(taken[source]):
                        self._progress.tell(done=1)
                        continue
                    self._progress.tell(doing=f"{label}: {source}")
                    answer = await self._once(subject, source)
                    if number >= 0 and answer is not None:  # the first round warms up
                        taken[source].append(answer)
                        self._progress.tell(done=1)
        finally:
            await self._holder.ask("drop", version=str(subject.version))
        for source, answers in taken.items():
            if answers and source not in self.left_out:
                self._note(subject, source, answers)

    def _is_enough(self, taken: Sequence[Mapping[str, Any]]) -> bool:
        took_s = sum(one["active_s"] or one["resident_s"] for one in taken)
        return len(taken) >= self._options.least and took_s >= self._options.row_s

    async def _once(self, subject: FetchSubject, source: Source) -> dict[str, Any] | None:
        """One repetition; None, and the source is left out, if it cannot be had."""
        if source in ("ucx", "tcp"):
            tree = wanted_tree(subject, peers=[("peer", source, self._addresses[source])])
        elif source == "origin":
            tree = wanted_tree(subject, directory=subject.stored)
        else:
            weights = subject.folder / WEIGHTS_FILE
            problem = await asyncio.to_thread(_make_cold if source == "cold_disk" else _make_warm, weights)
            if problem:
                self.left_out[source] = problem
                return None
            tree = wanted_tree(subject, directory=subject.folder, is_plain=True)
        try:
            answer = await self._fetcher.ask("fetch", wanted=tree)
        except LoraServeError as error:
            if source != "ucx":
                raise
            self.left_out[source] = f"it does not work here: {error}"
            return None
        return answer

    def _note(self, subject: FetchSubject, source: Source, answers: list[dict[str, Any]]) -> None:
        active = [one["active_s"] for one in answers if one["active_s"] is not None]
        self.rows.append(
            FetchRow(
                label=subject.shape.label,
                rank=subject.shape.rank,
                size_bytes=subject.body_bytes,
                source=source,
                resident=spread_s([one["resident_s"] for one in answers]),
                active=spread_s(active) if active else None,
            )
        )
        about = {"label": subject.shape.label, "wanted_from": source}
        self.samples += [{**about, **one} for one in answers]


def _make_cold(path: Path) -> str:
    """'' once no page of the file is in memory, else why that cannot be."""
    try:
        drop_pages(path)
        share = share_in_memory(path)
    except (OSError, AttributeError) as error:
        return f"the pages of a file cannot be dropped here: {error}"
    if share is None:
        return "this system does not say whether a file is in memory"
    if share > COLD_SHARE:
        return f"{share:.0%} of a file stay in memory although they were to be dropped (a disk of memory?)"
    return ""


def _make_warm(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 * 1024**2)
        while file.readinto(buffer):
            pass
    return ""


def _check_memory(shapes: Sequence[Shape]) -> None:
    """WorkFailedError if the largest adapter would not fit beside what runs here."""
    largest = max(shapes, key=lambda shape: shape.body_bytes)
    free_bytes = _available_bytes()
    needed_bytes = _MEMORY_COPIES * largest.body_bytes + _SPARE_BYTES
    if free_bytes is not None and needed_bytes > free_bytes:
        raise WorkFailedError(
            f"{largest.label}: needs {show_size(needed_bytes)} of memory to be measured, "
            f"{show_size(free_bytes)} are free"
        )


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
