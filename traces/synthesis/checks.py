"""Limits of what a workload may ask for, and the one line that refuses the rest."""

import math

from traces.types import TraceError

MAX_REQUESTS = 50_000_000
MAX_DURATION_S = 10 * 366 * 86_400.0
MAX_ADAPTERS = 1_000_000
MAX_RANK = 65_536
MAX_TOKENS = 10_000_000
MAX_SEGMENTS = 1_000_000
"""The most pieces that a run is cut into, be it by a changing rate or by drifting popularity."""

MAX_CELLS = 20_000_000
"""The most (piece, adapter) pairs of a drift, which bounds its memory to a few hundred MB."""


def check_number(what: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high], or NaN."""
    if not low <= value <= high:
        raise TraceError(f"{what} is {_shown(value)}; it must be from {_shown(low)} to {_shown(high)}")


def check_above_zero(what: str, value: float, high: float = math.inf) -> None:
    """Refuse a number that is not above 0, or is above `high`, infinite or NaN."""
    if not 0 < value <= high or value == math.inf:
        right = "above 0" if high == math.inf else f"above 0 and at most {high:g}"
        raise TraceError(f"{what} is {_shown(value)}; it must be {right}")


def _shown(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if abs(value) < 10**18:
        return f"{value:,}"
    # Neither a float nor, beyond some thousand digits, a text can be made of it.
    return f"a number of {value.bit_length()} bits"


def check_segments(what: str, duration_s: float, step_s: float, width: int = 1) -> int:
    """How many steps a run has; TraceError when they and `width` ask for too much memory."""
    steps = math.floor(duration_s / step_s) + 1 if duration_s / step_s < MAX_CELLS else MAX_CELLS
    if steps > MAX_SEGMENTS or steps * width > MAX_CELLS:
        least_s = duration_s / min(MAX_SEGMENTS, MAX_CELLS // width)
        raise TraceError(f"{what} of {step_s:g} s is too short; it must be above {least_s:.3g} s here")
    return steps
