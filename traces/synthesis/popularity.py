"""Which adapters are popular: a weight for each, and the draw of one per request.

A law gives weights by place; `by-rank` alone looks at the adapters' ranks.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from traces.synthesis.checks import MAX_ADAPTERS, check_number
from traces.synthesis.files import read_small
from traces.synthesis.portable import Floats, counting, exp, log, power_of, shares
from traces.types import TraceError


class Popularity(Protocol):
    """A law of popularity; `by_rank` says that it needs to know the ranks."""

    by_rank: ClassVar[bool]

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per adapter, given their ranks (or only their number where `by_rank` is false)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Every adapter equally."""

    by_rank: ClassVar[bool] = False

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        return shares(np.ones(_number(ranks)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Zipf:
    """The k-th place weighs k to the power of minus `exponent`."""

    by_rank: ClassVar[bool] = False
    exponent: float = 1.0

    def __post_init__(self) -> None:
        check_number("exponent of zipf popularity", self.exponent, 0.0, 50.0)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        return shares(power_of(_places(ranks), -self.exponent))


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """S-LoRA's law: one of the first k of n comes with probability (k / n) ** alpha.

    Its generator draws the place as int(n * numpy.random.power(alpha)); alpha 1 is uniform, below 1 the
    first are popular, above 1 the last.
    """

    by_rank: ClassVar[bool] = False
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number("alpha of power popularity", self.alpha, 0.01, 100.0)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        number = _number(ranks)
        cumulative = power_of(_places(number) / number, self.alpha)
        return np.diff(cumulative, prepend=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    """Weights as a Pareto distribution with this tail index would have them: its n mid-quantiles."""

    by_rank: ClassVar[bool] = False
    alpha: float = 1.5

    def __post_init__(self) -> None:
        check_number("alpha of pareto popularity", self.alpha, 0.05, 100.0)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        number = _number(ranks)
        return shares(power_of((_places(number) - 0.5) / number, -1.0 / self.alpha))


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometric:
    """Each place weighs `ratio` times as much as the next; 1.5 is Punica's "zipf"."""

    by_rank: ClassVar[bool] = False
    ratio: float = 1.5

    def __post_init__(self) -> None:
        check_number("ratio of geometric popularity", self.ratio, 1.0, 1e6)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        places = _places(ranks)
        return shares(exp((1.0 - places) * float(log(np.full(1, self.ratio))[0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretched:
    """The k-th place weighs exp(-(k / scale) ** shape).

    With shape 0.537 and scale 2.38 it is within 2.7 % (total variation) of the popularity of the 128
    Azure functions that Toppings (ATC'25) takes for adapters; our fit.
    """

    by_rank: ClassVar[bool] = False
    shape: float = 0.537
    scale: float = 2.38

    def __post_init__(self) -> None:
        check_number("shape of stretched popularity", self.shape, 0.05, 2.0)
        check_number("scale of stretched popularity", self.scale, 1e-3, 1e6)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        return shares(exp(-power_of(_places(ranks) / self.scale, self.shape)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """dLoRA's mapping of functions to adapters: function i is adapter (i // stride) % n, and function i
    is the (i+1)-th most popular under Zipf's law."""

    by_rank: ClassVar[bool] = False
    functions: int = 1_000
    stride: int = 8
    exponent: float = 1.0

    def __post_init__(self) -> None:
        check_number("functions of blocks popularity", self.functions, 1, MAX_ADAPTERS)
        check_number("stride of blocks popularity", self.stride, 1, MAX_ADAPTERS)
        check_number("exponent of blocks popularity", self.exponent, 0.0, 50.0)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        number = _number(ranks)
        places = np.arange(self.functions) // self.stride % number
        of_function = power_of(_places(self.functions), -self.exponent)
        return shares(np.bincount(places, weights=of_function, minlength=number).astype(np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class FromFile:
    """Weights of a file, biggest first: a numpy `.npy` array, or numbers in text, one per line or
    separated by commas or blanks. It may hold more weights than there are adapters, not fewer."""

    by_rank: ClassVar[bool] = False
    path: str

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        found, number = _read_weights(self.path), _number(ranks)
        if len(found) < number:
            raise TraceError(f"{len(found)} weights for {number} adapters; give one each", source=self.path)
        if not np.all(np.isfinite(found)) or np.any(found < 0) or not np.any(found):
            raise TraceError("weights must be 0 or more, finite, and one above 0", source=self.path)
        biggest = np.sort(found)[::-1][:number]
        # Relative to the biggest, so that not even huge ones overflow when they are summed.
        return shares(biggest / biggest[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The given weights in this order, one per adapter."""

    by_rank: ClassVar[bool] = False
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            check_number("a weight", value, 0.0, 1e12)
        if not any(self.values):
            raise TraceError("there must be a weight above 0")

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per place."""
        if len(self.values) != _number(ranks):
            raise TraceError(f"{len(self.values)} weights for {_number(ranks)} adapters; give one each")
        return shares(np.asarray(self.values, dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ByRank:
    """Every adapter weighs what its rank does: `weights_of`, or 1 for a rank that is not there."""

    by_rank: ClassVar[bool] = True
    weights_of: tuple[tuple[int, float], ...] = ((128, 4.0),)

    def __post_init__(self) -> None:
        for rank, weight in self.weights_of:
            check_number(f"the weight of rank {rank}", weight, 0.0, 1e12)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per adapter."""
        of_rank = dict(self.weights_of)
        weights = np.array([of_rank.get(rank, 1.0) if rank else 1.0 for rank in _known(ranks)])
        if not np.any(weights):
            raise TraceError("every rank of the workload weighs 0; one must be above 0")
        return shares(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShares:
    """All adapters of a rank together have a share; `inside` divides it among them by place."""

    by_rank: ClassVar[bool] = True
    shares_of: tuple[tuple[int, float], ...]
    inside: Popularity = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        for rank, share in self.shares_of:
            check_number(f"the share of rank {rank}", share, 0.0, 1e12)
        _check_inside(self.inside)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per adapter."""
        of_rank = dict(self.shares_of)
        missing = {rank for rank in _known(ranks) if rank not in of_rank}
        if missing:
            named = ", ".join(map(str, sorted(rank or 0 for rank in missing)[:10]))
            raise TraceError(f"no share is given for rank {named}; give every rank one")
        return _divided(_known(ranks), of_rank, self.inside)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPower:
    """A power law over ranks: all adapters of the k-th smallest rank together weigh k ** alpha.

    Above 0 high ranks are popular, below 0 low ones; `inside` divides a rank's share among its
    adapters by place.
    """

    by_rank: ClassVar[bool] = True
    alpha: float = 0.0
    inside: Popularity = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_number("alpha of rank-power popularity", self.alpha, -10.0, 10.0)
        _check_inside(self.inside)

    def weights(self, ranks: Sequence[int | None] | int) -> Floats:
        """A share per adapter."""
        distinct = sorted({rank or 0 for rank in _known(ranks)})
        of_rank = power_of(counting(len(distinct)), self.alpha).tolist()
        return _divided(_known(ranks), dict(zip(distinct, of_rank, strict=True)), self.inside)


def _check_inside(law: Popularity) -> None:
    if law.by_rank:
        raise TraceError("inside a rank popularity cannot go by rank; name another law")


def _divided(ranks: Sequence[int | None], of_rank: Mapping[int, float], inside: Popularity) -> Floats:
    """The shares of the ranks that are there, each divided among its adapters."""
    of_adapter = np.array([rank or 0 for rank in ranks])
    weights = np.zeros(len(of_adapter))
    for rank in np.unique(of_adapter).tolist():
        (places,) = np.nonzero(of_adapter == rank)
        weights[places] = of_rank[rank] * inside.weights(len(places))
    if not np.any(weights):
        raise TraceError("every rank of the workload has a share of 0; one must be above 0")
    return shares(weights)


def choose(weights: Floats, uniform: Floats) -> NDArray[np.int64]:
    """The place that each uniform number falls on."""
    cumulative = np.cumsum(weights)
    places = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.asarray(np.minimum(places, int(np.flatnonzero(weights)[-1])))


def _number(ranks: Sequence[int | None] | int) -> int:
    return ranks if isinstance(ranks, int) else len(ranks)


def _known(ranks: Sequence[int | None] | int) -> Sequence[int | None]:
    if isinstance(ranks, int):
        raise TraceError("popularity by rank needs the adapters' ranks")
    return ranks


def _places(ranks: Sequence[int | None] | int) -> Floats:
    return counting(_number(ranks))


def _read_weights(path: str) -> Floats:
    """The numbers of a file, whatever its name; bounded, and no pickled objects."""
    content = read_small(path)
    try:
        if content[:6] != b"\x93NUMPY":
            return np.array([_finite(word) for word in content.decode().replace(",", " ").split()])
        stored = np.load(io.BytesIO(content), allow_pickle=False)
        if stored.dtype.kind not in "fiu":
            raise ValueError(f"an array of {stored.dtype}")
        return np.asarray(stored, dtype=np.float64).ravel()
    except (ValueError, MemoryError, EOFError) as error:
        what = str(error).splitlines()[0][:120] if str(error) else "too big"
        raise TraceError(f"no weights: {what}; expected .npy, or numbers in text", source=path) from error


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word[:40]} is no finite number")
    return value


POPULARITY: dict[str, type[Popularity]] = {
    "uniform": Uniform,
    "zipf": Zipf,
    "power": Power,
    "pareto": Pareto,
    "geometric": Geometric,
    "stretched": Stretched,
    "blocks": Blocks,
    "file": FromFile,
    "weights": Weights,
    "by-rank": ByRank,
    "rank-shares": RankShares,
    "rank-power": RankPower,
}
"""The names of the laws in text, such as `zipf:exponent=1.2`."""
