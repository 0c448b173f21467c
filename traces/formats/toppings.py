"""Toppings' arrivals (its artifact, Suyi32/ae-296): a line of `=`, perhaps with a line of figures before
it, then one arrival in seconds per line.

Adapters are drawn independently from a file of shares (`.npy`), named by the caller or lying beside:
`...arrivals...txt` to `...popularity...npy`. Without one all requests are the base model's. No tokens.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from traces.formats.base import Parser, Row, Setting, TraceFormat, seconds
from traces.types import TraceError

MAX_POPULARITY_BYTES = 1 << 20


def _beside(trace: Path) -> Path | None:
    if "arrivals" not in trace.name:
        return None
    path = trace.with_name(trace.name.replace("arrivals", "popularity")).with_suffix(".npy")
    return path if path.is_file() else None


def read_popularity(path: Path) -> NDArray[np.float64]:
    """Shares that sum to 1, from a `.npy` file of one axis; TraceError."""
    try:
        if path.stat().st_size > MAX_POPULARITY_BYTES:
            raise ValueError(f"it is larger than {MAX_POPULARITY_BYTES:,} bytes")
        shares = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(shares, np.ndarray) or shares.ndim != 1 or shares.dtype.kind not in "fiu":
            raise ValueError("it is not one row of numbers")
        weights = np.asarray(shares, dtype=np.float64)
        if not len(weights) or not bool(np.all(weights >= 0)) or not 0 < float(weights.sum()) < np.inf:
            raise ValueError("it needs shares of 0 and more, not all 0")
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0][:200]
        raise TraceError(
            f"no popularity of adapters ({reason}); expected a .npy of shares", source=str(path)
        ) from error
    return np.asarray(weights / weights.sum())


class _Parser(Parser):
    has_lengths = False

    def __init__(self, first: str, setting: Setting) -> None:
        path = setting.popularity or _beside(setting.path)
        self._sums = np.cumsum(read_popularity(path)) if path else None
        self._rng = np.random.default_rng(setting.seed)

    def row(self, text: str) -> Row | None:
        if _is_rule(text):
            return None
        time_s = seconds(text.strip(), "arrival")
        if self._sums is None:
            return Row(time_s=time_s)
        place = int(np.searchsorted(self._sums, self._rng.random(), side="right"))
        return Row(time_s=time_s, adapter=f"adapter-{min(place, len(self._sums) - 1)}")


def _is_rule(line: str) -> bool:
    text = line.strip()
    return len(text) >= 4 and set(text) == {"="}


def _matches(line: str) -> bool:
    return _is_rule(line) or line.startswith("Number of Events:")


TOPPINGS = TraceFormat(
    name="toppings",
    layout="a line of ====, then one arrival in seconds per line",
    matches=_matches,
    parser=_Parser,
)
