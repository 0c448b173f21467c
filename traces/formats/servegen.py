"""ServeGen's clients (alibaba/ServeGen): a rate curve, from which requests are drawn by the seed.

Headerless `start,rate,cv,Gamma|Weibull|(empty),shape,scale`, one line per window. Gaps are drawn from
the window's distribution, scaled so that their mean is 1/rate: the rate was counted, the scale fitted.
Lengths come from the data set beside it, `...trace.csv` to `...dataset.json` (or `.json.gz`): JSON from a
window's start to Python dicts, written as strings, of tokens to probability. Prompt and output are
drawn apart, as ServeGen does.
"""

import gzip
import json
import math
import re
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.formats.base import (
    MAX_TOKENS,
    NUMBER,
    Block,
    Parser,
    RowError,
    Setting,
    TraceFormat,
    expect_fields,
    fields_of,
    seconds,
    shown,
)
from traces.types import TraceError

MAX_DATASET_BYTES = 64 << 20
MAX_REQUESTS_PER_WINDOW = 10_000_000
MAX_SHAPE = 1e6
MIN_SHAPE = 1e-3

_COLUMNS = ("start", "rate", "cv", "distribution", "shape", "scale")
_DISTRIBUTIONS = ("", "Gamma", "Weibull")
_LAST_WINDOW_S = 600.0
"""How long the last window is when it is the only one."""
_PAIR = re.compile(r"([0-9]{1,9}): ?([0-9.]+(?:e[+-]?[0-9]{1,3})?)[,}]", re.ASCII)


class _Lengths:
    """How many tokens, and the running sum of their probabilities."""

    def __init__(self, text: str) -> None:
        pairs = [(int(tokens), float(weight)) for tokens, weight in _PAIR.findall(text)]
        self._tokens = np.array([min(max(tokens, 1), MAX_TOKENS) for tokens, _ in pairs], dtype=np.int32)
        self._sums = np.cumsum([weight for _, weight in pairs])
        if not pairs or not 0 < self._sums[-1] < math.inf:
            raise ValueError("no probabilities")

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
        places = np.searchsorted(self._sums, rng.random(count) * self._sums[-1], side="right")
        return np.asarray(self._tokens[np.minimum(places, len(self._tokens) - 1)])


def _dataset_path(trace: Path) -> Path | None:
    name = trace.name.removesuffix(".gz").removesuffix(".csv")
    stem = name.removesuffix("trace")
    if stem == name:
        return None
    candidates = (trace.with_name(f"{stem}dataset{suffix}") for suffix in (".json", ".json.gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_dataset(path: Path) -> dict[int, tuple[_Lengths, _Lengths]]:
    """The lengths from the start of each window on."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(MAX_DATASET_BYTES + 1)
        if len(data) > MAX_DATASET_BYTES:
            raise ValueError(f"it is larger than {MAX_DATASET_BYTES:,} bytes")
        tree: Any = json.loads(data)
        windows = {
            int(start): (_Lengths(fields["input_tokens"]), _Lengths(fields["output_tokens"]))
            for start, fields in tree.items()
            if fields["input_tokens"] != "{}" and fields["output_tokens"] != "{}"
        }
        if not windows:
            raise ValueError("it has no window with lengths")
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        right = 'expected JSON {"0": {"input_tokens": "{45: 0.5, ...}", "output_tokens": "{...}"}, ...}'
        raise TraceError(f"no usable lengths ({reason}); {right}", source=str(path)) from error
    return dict(sorted(windows.items()))


class _Parser(Parser):
    expands = True

    def __init__(self, first: str, setting: Setting) -> None:
        self._rng = np.random.default_rng(setting.seed)
        dataset = _dataset_path(setting.path)
        self._windows = _read_dataset(dataset) if dataset else {}
        self._starts = list(self._windows)
        self.has_lengths = bool(self._windows)
        self._held: tuple[float, float, str, float] | None = None
        self._window_s = _LAST_WINDOW_S

    def expand(self, text: str) -> Block:
        """The requests of the window before this line's, whose length this line tells."""
        window = self._window(fields_of(text))
        held, self._held = self._held, window
        if held is None:
            return self._nothing()
        if window[0] <= held[0]:
            raise RowError(f"start {window[0]:g} is not after the start before it, {held[0]:g}")
        self._window_s = window[0] - held[0]
        return self._draw(held)

    def finish(self) -> Block:
        held, self._held = self._held, None
        return self._nothing() if held is None else self._draw(held)

    def _window(self, fields: list[str]) -> tuple[float, float, str, float]:
        expect_fields(fields, _COLUMNS)
        start_s, rate = seconds(fields[0], "start"), _number(fields[1], "rate")
        name, shape = fields[3], _number(fields[4], "shape")
        if name not in _DISTRIBUTIONS:
            raise RowError(f"distribution is {shown(name)}; expected Gamma, Weibull or nothing")
        if name and not MIN_SHAPE <= shape <= MAX_SHAPE:
            raise RowError(f"shape is {shape:g}; expected {MIN_SHAPE:g} to {MAX_SHAPE:g}")
        return start_s, rate if name else 0.0, name, shape

    def _nothing(self) -> Block:
        none = np.zeros(0, dtype=np.int32)
        return Block(time_s=np.zeros(0), prompt_tokens=none, output_tokens=none)

    def _draw(self, window: tuple[float, float, str, float]) -> Block:
        start_s, rate, name, shape = window
        expected = rate * self._window_s
        if expected > MAX_REQUESTS_PER_WINDOW:
            raise RowError(
                f"{expected:,.0f} requests in a window; expected at most {MAX_REQUESTS_PER_WINDOW:,}"
            )
        if rate == 0:
            return self._nothing()
        time_s = start_s + self._arrivals(rate, name, shape)
        if not self._windows:
            return Block(time_s=time_s)
        place = max(bisect_right(self._starts, start_s) - 1, 0)
        prompt, output = self._windows[self._starts[place]]
        count = len(time_s)
        return Block(
            time_s=time_s,
            prompt_tokens=prompt.draw(count, self._rng),
            output_tokens=output.draw(count, self._rng),
        )

    def _arrivals(self, rate: float, name: str, shape: float) -> NDArray[np.float64]:
        """The times inside a window at which a renewal process with these gaps renews."""
        from scipy.special import gamma, gammaincinv

        batch = int(rate * self._window_s) + 16
        end_s, times = 0.0, []
        total = 0
        while end_s < self._window_s and total <= 4 * MAX_REQUESTS_PER_WINDOW:
            uniform = self._rng.random(batch)
            if name == "Gamma":
                gaps = gammaincinv(shape, uniform) / shape
            else:
                gaps = (-np.log1p(-uniform)) ** (1 / shape) / gamma(1 + 1 / shape)
            part = end_s + np.cumsum(gaps) / rate
            end_s = float(part[-1])
            times.append(part)
            total += batch
        joined = np.concatenate(times)
        return joined[joined < self._window_s]


def _number(text: str, column: str) -> float:
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not 0 <= value < math.inf:
        raise RowError(f"{column} is {shown(text)}; expected a number from 0")
    return value


def _matches(line: str) -> bool:
    try:
        fields = fields_of(line)
        if len(fields) != len(_COLUMNS) or fields[3] not in _DISTRIBUTIONS:
            return False
        for place in (0, 1, 2, 4, 5):
            _number(fields[place], "")
    except RowError:
        return False
    return True


SERVEGEN = TraceFormat(
    name="servegen",
    layout="CSV without a header: start,rate,cv,Gamma|Weibull|,shape,scale (lengths: ...dataset.json)",
    has_header=False,
    matches=_matches,
    parser=_Parser,
    ordered=False,
)
