"""Which adapters a workload has: their names and ranks, and how ranks go with popularity."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from traces.columns import TraceAdapter
from traces.formats.slora import rank_in_name
from traces.synthesis.checks import MAX_ADAPTERS, MAX_RANK, check_number
from traces.synthesis.files import read_small
from traces.synthesis.portable import Floats, apportion, counting, normals, power_of
from traces.types import TraceError

LORASERVE_RANKS = (8, 16, 32, 64, 128)

_MAX_NAME_CHARACTERS = 512


class Ranks(Protocol):
    """A law of ranks; `in_order` says that the order of its adapters means something."""

    in_order: ClassVar[bool]

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """`number` adapters, the lowest rank first, or those that the law itself names, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualRanks:
    """As many adapters of each rank, a remainder going to the first ranks."""

    in_order: ClassVar[bool] = False
    of: tuple[int, ...] = LORASERVE_RANKS

    def __post_init__(self) -> None:
        _check_ranks(self.of)

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """`number` adapters, the lowest rank first."""
        return _apportioned(self.of, np.ones(len(self.of)), number)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedRanks:
    """Adapters per rank in the ratio of these weights."""

    in_order: ClassVar[bool] = False
    weights_of: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        _check_ranks([rank for rank, _ in self.weights_of])
        for rank, weight in self.weights_of:
            check_number(f"the weight of rank {rank}", weight, 0.0, 1e12)
        if not any(weight for _, weight in self.weights_of):
            raise TraceError("every rank weighs 0; one must be above 0")

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """`number` adapters, the lowest rank first."""
        ranks, weights = zip(*self.weights_of, strict=True)
        return _apportioned(ranks, np.array(weights, dtype=np.float64), number)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerRanks:
    """A power law over the number of adapters: the k-th smallest rank has k ** alpha of them."""

    in_order: ClassVar[bool] = False
    alpha: float = 0.0
    of: tuple[int, ...] = LORASERVE_RANKS

    def __post_init__(self) -> None:
        check_number("alpha of power ranks", self.alpha, -10.0, 10.0)
        _check_ranks(self.of)

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """`number` adapters, the lowest rank first."""
        ranks = sorted(self.of)
        return _apportioned(ranks, power_of(counting(len(ranks)), self.alpha), number)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRanks:
    """Each adapter's rank is drawn on its own, every rank equally likely, as Toppings does."""

    in_order: ClassVar[bool] = False
    of: tuple[int, ...] = (8, 16, 32, 64)

    def __post_init__(self) -> None:
        _check_ranks(self.of)

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """`number` adapters, the lowest rank first."""
        drawn = np.floor(rng.random(number) * len(self.of)).astype(np.int64)
        return _named(np.sort(np.array(self.of)[drawn]).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedAdapters:
    """These adapters, whose names tell their ranks as `my-rank-8-3` does."""

    in_order: ClassVar[bool] = True
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.names:
            if rank_in_name(name) is None:
                raise TraceError(f"the name {name[:80]!r} tells no rank; expected one like my-rank-8-3")
        _check_adapters([TraceAdapter(name=name) for name in self.names], "the names")

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """These adapters in this order."""
        return tuple(TraceAdapter(name=name, rank=rank_in_name(name)) for name in self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersOfFile:
    """The adapters of a file in its order: one per line, `name,rank`, or a name that tells its rank."""

    in_order: ClassVar[bool] = True
    path: str

    def adapters(self, number: int, rng: np.random.Generator) -> tuple[TraceAdapter, ...]:
        """The file's adapters in its order."""
        found = []
        for line, fields in _rows(self.path):
            if len(fields) > 2:
                raise TraceError(f"{len(fields)} fields; expected name,rank", source=self.path, line=line)
            rank = _rank_of(fields)
            if rank is None:
                raise TraceError(
                    f"no rank from 1 to {MAX_RANK:,}; expected name,rank", source=self.path, line=line
                )
            found.append(TraceAdapter(name=fields[0], rank=rank))
        _check_adapters(found, self.path)
        return tuple(found)


def lay_out(
    adapters: Sequence[TraceAdapter], weights: Floats, correlation: float, rng: np.random.Generator
) -> tuple[TraceAdapter, ...]:
    """The adapters in an order in which rank goes with popularity as `correlation` says.

    At 1 the adapter of the biggest weight has the highest rank, at -1 the lowest, at 0 rank and weight
    have nothing to do with each other; between, rank order is blurred by normal noise.
    """
    number = len(adapters)
    ranks = np.array([adapter.rank or 0 for adapter in adapters])
    place = np.empty(number)
    place[np.argsort(ranks, kind="stable")] = np.arange(number)
    centred = (place - (number - 1) / 2) * np.sqrt(12.0) / number
    key = correlation * centred + np.sqrt(1.0 - correlation * correlation) * normals(rng, number)
    by_key = np.argsort(-key, kind="stable")
    laid: list[TraceAdapter] = list(adapters)
    for at, adapter in zip(np.argsort(-weights, kind="stable"), by_key, strict=True):
        laid[at] = adapters[adapter]
    return tuple(laid)


def _apportioned(ranks: Sequence[int], weights: Floats, number: int) -> tuple[TraceAdapter, ...]:
    counts = apportion(weights, number)
    pairs = sorted(zip(ranks, counts.tolist(), strict=True))
    return _named([rank for rank, count in pairs for _ in range(count)])


def _named(ranks: Sequence[int]) -> tuple[TraceAdapter, ...]:
    """An adapter `rank-R-K` for each rank, K counting from 0 within a rank."""
    seen: dict[int, int] = {}
    adapters = []
    for rank in ranks:
        adapters.append(TraceAdapter(name=f"rank-{rank}-{seen.setdefault(rank, 0)}", rank=rank))
        seen[rank] += 1
    return tuple(adapters)


def _check_ranks(ranks: Sequence[int]) -> None:
    if not ranks or len(set(ranks)) != len(ranks):
        raise TraceError("ranks must be at least one, each named once, such as 8/16/32")
    for rank in ranks:
        check_number("a rank", rank, 1, MAX_RANK)


def _check_adapters(adapters: Sequence[TraceAdapter], source: str) -> None:
    if not 1 <= len(adapters) <= MAX_ADAPTERS:
        raise TraceError(f"{len(adapters)} adapters; expected 1 to {MAX_ADAPTERS:,}", source=source)
    names = [adapter.name for adapter in adapters]
    twice, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise TraceError(f"the adapter {twice[:80]!r} is there twice; name each once", source=source)
    for name in names:
        if not name or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
            raise TraceError(f"{name[:80]!r} is no adapter name; use printable ones", source=source)


def _rank_of(fields: Sequence[str]) -> int | None:
    if len(fields) == 1:
        return rank_in_name(fields[0])
    text = fields[1]
    rank = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0
    return rank if 1 <= rank <= MAX_RANK else None


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that say something, numbered, as their stripped fields."""
    try:
        text = read_small(path).decode()
        for line, row in enumerate(csv.reader(io.StringIO(text)), start=1):
            fields = [field.strip() for field in row]
            if fields and fields[0] and not fields[0].startswith("#") and fields != ["name", "rank"]:
                yield line, fields
    except UnicodeDecodeError as error:
        raise TraceError("is no UTF-8 text; expected lines of name,rank", source=path) from error
    except csv.Error as error:
        raise TraceError(f"is no list of name,rank: {error}", source=path) from error


RANKS: dict[str, type[Ranks]] = {
    "equal": EqualRanks,
    "weighted": WeightedRanks,
    "power": PowerRanks,
    "drawn": DrawnRanks,
    "names": NamedAdapters,
    "file": AdaptersOfFile,
}
"""The names of the laws in text, such as `equal:8/16/32`."""
