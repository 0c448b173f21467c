"""The figures of `bench fetch`, from the times of its rows. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

Source = Literal["ucx", "tcp", "page_cache", "cold_disk", "origin"]
PEERS: tuple[Source, ...] = ("ucx", "tcp")
LOCAL: tuple[Source, ...] = ("page_cache", "cold_disk", "origin")
SOURCES: tuple[Source, ...] = (*PEERS, *LOCAL)
LABELS: Mapping[Source, str] = {
    "ucx": "a peer over ucx",
    "tcp": "a peer over tcp",
    "page_cache": "a folder, in the page cache",
    "cold_disk": "a folder, from the cold disk",
    "origin": "the controller's store",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondsSpread:
    """The median of repetitions, the middle half of them, and how many there were."""

    median_s: float
    p25_s: float
    p75_s: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRow:
    """One adapter from one source: until it is resident (a sealed, verified segment), and until it is active
    in a slot of an engine, None without one."""

    label: str
    rank: int
    size_bytes: int
    source: Source
    resident: SecondsSpread
    active: SecondsSpread | None = None

    @property
    def bytes_per_s(self) -> float:
        """To resident."""
        return self.size_bytes / self.resident.median_s


def spread_s(samples_s: Sequence[float]) -> SecondsSpread:
    """Of at least one repetition; ValueError for none."""
    if not samples_s:
        raise ValueError("no repetitions")
    low = high = samples_s[0]
    if len(samples_s) > 1:
        low, _, high = quantiles(samples_s, n=4, method="inclusive")
    return SecondsSpread(median_s=median(samples_s), p25_s=low, p75_s=high, samples=len(samples_s))


def faster_from_bytes(rows: Iterable[FetchRow], peer: Source, local: Source) -> int | None:
    """The smallest measured size from which on, at every larger one too, the peer's median is the shorter
    one; None if there is none, or if one of the two was not measured."""
    times: dict[int, dict[Source, float]] = {}
    for row in rows:
        times.setdefault(row.size_bytes, {})[row.source] = row.resident.median_s
    found: int | None = None
    for size_bytes in sorted(times, reverse=True):
        both = times[size_bytes]
        if peer not in both or local not in both:
            continue
        if both[peer] >= both[local]:
            break
        found = size_bytes
    return found


def faster_table(rows: Sequence[FetchRow]) -> dict[str, dict[str, int | None]]:
    """`faster_from_bytes` for every pair that was measured."""
    measured = {row.source for row in rows}
    return {
        peer: {local: faster_from_bytes(rows, peer, local) for local in LOCAL if local in measured}
        for peer in PEERS
        if peer in measured
    }
