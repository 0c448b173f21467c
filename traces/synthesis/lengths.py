"""How long prompts and outputs are: pairs of token counts, drawn or taken from a trace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from traces.columns import TraceColumns
from traces.synthesis.arrivals import Load
from traces.synthesis.azure import AZURE_BANDS, AZURE_LEVELS
from traces.synthesis.checks import MAX_TOKENS, check_number
from traces.synthesis.portable import Floats, draw_accepted, exp, log, normals, shares
from traces.types import TraceError

Over = Literal["clip", "redraw"]

_MIN_PAIRS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The longest prompt and output; a pair with a longer one is cut to them (`clip`) or drawn anew
    (`redraw`, which is what LoRAServe's generator does)."""

    max_prompt_tokens: int = MAX_TOKENS
    max_output_tokens: int = MAX_TOKENS
    over: Over = "clip"

    def __post_init__(self) -> None:
        check_number("the limit of prompt tokens", self.max_prompt_tokens, 1, MAX_TOKENS)
        check_number("the limit of output tokens", self.max_output_tokens, 1, MAX_TOKENS)
        if self.over not in ("clip", "redraw"):
            raise TraceError(f"lengths over the limits cannot be {self.over!r}; expected clip or redraw")

    def apply(self, pairs: Floats) -> Floats:
        """Whole tokens within the limits: the pairs that are kept, cut."""
        whole = np.maximum(np.rint(pairs), 1.0)
        most = np.array([[self.max_prompt_tokens], [self.max_output_tokens]], dtype=np.float64)
        if self.over == "redraw":
            whole = whole[:, np.all(whole <= most, axis=0)]
        return np.asarray(np.minimum(whole, most))

    def fill(self, count: int, draw: Callable[[int], Floats]) -> Floats:
        """`count` pairs of those that `draw(n)` gives, within the limits."""
        if self.over == "clip":
            return self.apply(draw(count))
        return draw_accepted(count, lambda batch: self.apply(draw(batch)), "lengths within the limits")


class Lengths(Protocol):
    """A law of lengths."""

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count), whole numbers within the limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Every prompt and every output has the same length."""

    prompt_tokens: int = 512
    output_tokens: int = 128

    def __post_init__(self) -> None:
        check_number("prompt_tokens of fixed lengths", self.prompt_tokens, 1, MAX_TOKENS)
        check_number("output_tokens of fixed lengths", self.output_tokens, 1, MAX_TOKENS)

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        pair = np.array([[self.prompt_tokens], [self.output_tokens]], dtype=np.float64)
        return limits.fill(count, lambda batch: np.repeat(pair, batch, axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformLengths:
    """Every length in a range equally likely, prompts and outputs each for itself (S-LoRA: 8 to 512)."""

    prompt_low: int = 8
    prompt_high: int = 512
    output_low: int = 8
    output_high: int = 512

    def __post_init__(self) -> None:
        check_number("prompt_low of uniform lengths", self.prompt_low, 1, MAX_TOKENS)
        check_number("prompt_high of uniform lengths", self.prompt_high, self.prompt_low, MAX_TOKENS)
        check_number("output_low of uniform lengths", self.output_low, 1, MAX_TOKENS)
        check_number("output_high of uniform lengths", self.output_high, self.output_low, MAX_TOKENS)

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        low = np.array([[self.prompt_low], [self.output_low]], dtype=np.float64)
        high = np.array([[self.prompt_high], [self.output_high]], dtype=np.float64)
        return limits.fill(count, lambda batch: low + np.floor(rng.random((2, batch)) * (high - low + 1.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """Lognormal prompts and outputs around their medians; `log_correlation` is that of
    their logarithms."""

    prompt_median: float = 512.0
    prompt_sigma: float = 0.8
    output_median: float = 128.0
    output_sigma: float = 0.8
    log_correlation: float = 0.0

    def __post_init__(self) -> None:
        for name, median, sigma in (
            ("prompt", self.prompt_median, self.prompt_sigma),
            ("output", self.output_median, self.output_sigma),
        ):
            check_number(f"{name}_median of lognormal lengths", median, 1, MAX_TOKENS)
            check_number(f"{name}_sigma of lognormal lengths", sigma, 0, 10)
        check_number("log_correlation of lognormal lengths", self.log_correlation, -1, 1)

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        medians = np.array([[self.prompt_median], [self.output_median]])
        sigmas = np.array([[self.prompt_sigma], [self.output_sigma]])
        rest = np.sqrt(1.0 - self.log_correlation * self.log_correlation)

        def draw(batch: int) -> Floats:
            first, second = normals(rng, batch), normals(rng, batch)
            together = np.stack((first, self.log_correlation * first + rest * second))
            return np.asarray(medians * exp(sigmas * together))

        return limits.fill(count, draw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Requests of similar prompts: how many, and the quantiles of their prompts and outputs."""

    weight: float
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Banded:
    """A table of quantiles: a band is drawn by weight, then prompt and output from its quantiles.

    Keeps how outputs go with prompts, however oddly, as far as the bands tell them apart.
    """

    levels: tuple[float, ...]
    bands: tuple[Band, ...]

    def __post_init__(self) -> None:
        levels = np.asarray(self.levels)
        if len(levels) < 2 or levels[0] != 0 or levels[-1] != 1 or np.any(np.diff(levels) <= 0):
            raise TraceError("the levels of a length table must rise from 0 to 1")
        if not self.bands or not any(band.weight > 0 for band in self.bands):
            raise TraceError("a length table needs a band with a weight above 0")
        for band in self.bands:
            check_number("the weight of a band", band.weight, 0, 1e12)
            for quantiles in (band.prompt_tokens, band.output_tokens):
                if len(quantiles) != len(levels) or np.any(np.diff(quantiles) < 0):
                    raise TraceError("a band needs a quantile per level, and they must not fall")
                check_number("a length of a table", quantiles[0], 1, MAX_TOKENS)
                check_number("a length of a table", quantiles[-1], 1, MAX_TOKENS)

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        levels = np.asarray(self.levels)
        cumulative = np.cumsum(shares(np.array([band.weight for band in self.bands], dtype=np.float64)))
        tables = [
            np.array([band.prompt_tokens for band in self.bands], dtype=np.float64),
            np.array([band.output_tokens for band in self.bands], dtype=np.float64),
        ]

        def draw(batch: int) -> Floats:
            picks = rng.random((3, batch))
            band = np.searchsorted(cumulative, picks[0] * cumulative[-1], side="right")
            band = np.minimum(band, len(self.bands) - 1)
            return np.stack(
                [_look_up(table, band, levels, pick) for table, pick in zip(tables, picks[1:], strict=True)]
            )

        return limits.fill(count, draw)


def azure_conversation() -> Banded:
    """Lengths like those of Azure's conversation trace of 2023; see `traces.synthesis.azure`."""
    bands = tuple(
        Band(weight=weight, prompt_tokens=prompts, output_tokens=outputs)
        for weight, prompts, outputs in AZURE_BANDS
    )
    return Banded(levels=AZURE_LEVELS, bands=bands)


@dataclass(frozen=True, slots=True, kw_only=True)
class Azure:
    """Lengths like those of Azure's conversation trace of 2023, from the table that ships."""

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        return azure_conversation().pairs(count, rng, load, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Production:
    """Prompts of 330 to 1,020 tokens, about 730 in the mean, and outputs of 52 to 250, mostly short.

    That is what is known of the sanitised production trace in LoRAServe's artifact; the shape between
    these figures is ours.
    """

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        band = Band(
            weight=1.0, prompt_tokens=(330, 560, 785, 905, 1020), output_tokens=(52, 57, 70, 110, 250)
        )
        return Banded(levels=(0.0, 0.25, 0.5, 0.75, 1.0), bands=(band,)).pairs(count, rng, load, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Lengths from a table of quantiles that is fitted to a trace file."""

    path: str
    bands: int = 10

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        return fit_banded(load(self.path), bands=self.bands).pairs(count, rng, load, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLognormal:
    """Lognormal lengths fitted to a trace file: its medians, spreads and correlation."""

    path: str

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        return fit_lognormal(load(self.path)).pairs(count, rng, load, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """Requests of a trace file drawn with replacement, each prompt with its own output."""

    path: str

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        pool = limits.apply(_served(load(self.path)))
        if pool.shape[1] == 0:
            raise TraceError("no request is within the limits; widen them", source=self.path)
        return pool[:, np.floor(rng.random(count) * pool.shape[1]).astype(np.int64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InOrder:
    """The lengths of a trace file in its order, starting over when they run out."""

    path: str

    def pairs(self, count: int, rng: np.random.Generator, load: Load, limits: Limits) -> Floats:
        """Prompt and output tokens, shape (2, count)."""
        pool = limits.apply(_served(load(self.path)))
        if pool.shape[1] == 0:
            raise TraceError("no request is within the limits; widen them", source=self.path)
        return pool[:, np.arange(count) % pool.shape[1]]


def fit_banded(columns: TraceColumns, *, bands: int = 10) -> Banded:
    """A table of as many bands with about the same number of requests each, of similar prompts."""
    check_number("bands of fitted lengths", bands, 1, 1_000)
    prompts, outputs = _served(columns)
    order = np.lexsort((outputs, prompts))
    parts = [part for part in np.array_split(order, bands) if len(part)]
    return Banded(
        levels=AZURE_LEVELS,
        bands=tuple(
            Band(
                weight=float(len(part)),
                prompt_tokens=_quantiles(prompts[part], AZURE_LEVELS),
                output_tokens=_quantiles(outputs[part], AZURE_LEVELS),
            )
            for part in parts
        ),
    )


def fit_lognormal(columns: TraceColumns) -> Lognormal:
    """The lognormal law of maximum likelihood for a workload's lengths."""
    logs = log(_served(columns))
    means = [float(np.cumsum(row)[-1]) / len(row) for row in logs]
    centred = logs - np.array(means)[:, None]
    sigmas = [float(np.sqrt(np.cumsum(row * row)[-1] / len(row))) for row in centred]
    product = float(np.cumsum(centred[0] * centred[1])[-1]) / logs.shape[1]
    spread = sigmas[0] * sigmas[1]
    prompt_median, output_median = (float(exp(np.full(1, mean))[0]) for mean in means)
    return Lognormal(
        prompt_median=prompt_median,
        prompt_sigma=sigmas[0],
        output_median=output_median,
        output_sigma=sigmas[1],
        log_correlation=min(max(product / spread, -1.0), 1.0) if spread > 0 else 0.0,
    )


def _served(columns: TraceColumns) -> Floats:
    """Prompt and output tokens of the requests that have both, shape (2, n)."""
    has_both = (columns.prompt_tokens > 0) & (columns.output_tokens > 0)
    pairs = np.stack((columns.prompt_tokens[has_both], columns.output_tokens[has_both])).astype(np.float64)
    if pairs.shape[1] < _MIN_PAIRS:
        raise TraceError("no request has a prompt and an output to learn from", source=columns.source)
    return pairs


def _look_up(table: Floats, row: NDArray[np.int64], levels: Floats, pick: Floats) -> Floats:
    """The quantile `pick` of the table's row, on a straight line between its levels."""
    place = np.minimum(np.searchsorted(levels, pick, side="right") - 1, len(levels) - 2)
    low, high = table[row, place], table[row, place + 1]
    return np.asarray(low + (pick - levels[place]) / (levels[place + 1] - levels[place]) * (high - low))


def _quantiles(values: Floats, levels: tuple[float, ...]) -> tuple[int, ...]:
    """Whole quantiles between the closest ranks."""
    rising = np.sort(values)
    at = np.asarray(levels) * (len(rising) - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, len(rising) - 1)
    found = rising[low] + (at - low) * (rising[high] - rising[low])
    return tuple(np.rint(found).astype(np.int64).tolist())


LENGTHS: dict[str, type[Lengths]] = {
    "azure": Azure,
    "production": Production,
    "fixed": Fixed,
    "uniform": UniformLengths,
    "lognormal": Lognormal,
    "fit": Fitted,
    "fit-lognormal": FittedLognormal,
    "resample": Resampled,
    "in-order": InOrder,
}
"""The names of the laws in text, such as `fixed:512,128`."""
