"""Random numbers and functions that give the same bits on every machine.

numpy's `exp`, `log` and `power` differ in the last bit from one processor to the next, and so do the
distributions of its generators from one release to the next. Here everything is made of a generator's
plain uniform numbers and of operations that IEEE 754 rounds exactly, each in an array pass of its own.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from traces.types import TraceError

Floats = NDArray[np.float64]

_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_INVERSE_LN2 = 1.44269504088896338700e00
_SQRT_HALF = 0.7071067811865476
_EXP_TERMS = 14
_LOG_TERMS = 12

_MIN_BATCH = 256
_MAX_DRAWS_PER_VALUE = 1_000
_MAX_ROUNDS = 10_000


def stream(seed: int, aspect: int) -> np.random.Generator:
    """The random numbers of one aspect of a workload; those of other aspects do not depend on it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(aspect,))))


def open_uniform(rng: np.random.Generator, count: int) -> Floats:
    """Uniform numbers that are neither 0 nor 1."""
    return np.maximum(rng.random(count), 2.0**-54)


def exp(x: Floats) -> Floats:
    """e to the power of x, within two units of the last place; 0 where that is too small for a float."""
    bounded = np.clip(np.asarray(x, dtype=np.float64), -745.0, 709.0)
    whole = np.rint(bounded * _INVERSE_LN2)
    rest = (bounded - whole * _LN2_HIGH) - whole * _LN2_LOW
    total = np.ones_like(rest)
    for term in range(_EXP_TERMS, 0, -1):
        total = total * rest / term + 1.0
    return np.where(np.asarray(x) < -745.0, 0.0, np.ldexp(total, whole.astype(np.int32)))


def log(x: Floats) -> Floats:
    """The natural logarithm of x > 0, within a few units of the last place."""
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    is_low = mantissa < _SQRT_HALF
    mantissa = np.where(is_low, mantissa * 2.0, mantissa)
    power = exponent - is_low
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    total = np.zeros_like(ratio)
    for term in range(_LOG_TERMS, -1, -1):
        total = total * square + 1.0 / (2 * term + 1)
    return power * _LN2_HIGH + (power * _LN2_LOW + 2.0 * ratio * total)


def power_of(x: Floats, exponent: float) -> Floats:
    """x > 0 to a power."""
    return exp(exponent * log(x))


def counting(number: int) -> Floats:
    """1, 2, ... up to the number."""
    return np.arange(1, number + 1).astype(np.float64)


def shares(weights: Floats) -> Floats:
    """The weights, scaled to sum to 1."""
    return np.asarray(weights / np.cumsum(weights)[-1])


def draw_accepted(count: int, draw: Callable[[int], Floats], what: str) -> Floats:
    """The first `count` accepted columns of an array whose last axis `draw(n)` fills with n or fewer.

    TraceError when it accepts fewer than one in a thousand.
    """
    parts: list[Floats] = []
    have = tried = 0
    batch = max(_MIN_BATCH, count + count // 4)
    for _ in range(_MAX_ROUNDS):
        part = draw(batch)
        parts.append(part)
        have, tried = have + part.shape[-1], tried + batch
        if have >= count:
            return np.asarray(np.concatenate(parts, axis=-1)[..., :count])
        if tried > _MAX_DRAWS_PER_VALUE * max(count, _MIN_BATCH):
            break
        # As many as are likely to do, and no more than memory easily holds.
        still = (count - have) * tried // max(have, 1)
        batch = min(max(_MIN_BATCH, still + still // 8), max(_MIN_BATCH, 2 * count))
    raise TraceError(f"hardly any {what} can be drawn; widen its limits")


def normals(rng: np.random.Generator, count: int) -> Floats:
    """Standard normal numbers, by Marsaglia's polar method (SIAM Review 6, 1964)."""

    def draw(batch: int) -> Floats:
        first, second = 2.0 * rng.random((2, batch)) - 1.0
        square = first * first + second * second
        inside = (square > 0.0) & (square < 1.0)
        first, second, square = first[inside], second[inside], square[inside]
        scale = np.sqrt(-2.0 * log(square) / square)
        return np.concatenate((first * scale, second * scale))

    return draw_accepted(count, lambda batch: draw(batch // 2 + 1), "normal number")


def log_gammas(rng: np.random.Generator, shape: float, count: int) -> Floats:
    """Logarithms of gamma variates of scale 1, by Marsaglia and Tsang's method (ACM TOMS 26, 2000).

    Logarithms, because for a small shape most variates are too small for a float.
    """
    boosted = shape + 1.0 if shape < 1.0 else shape
    d = boosted - 1.0 / 3.0
    c = 1.0 / np.sqrt(9.0 * d)

    def draw(batch: int) -> Floats:
        x = normals(rng, batch)
        root = 1.0 + c * x
        cubed = root * root * root
        log_uniform = log(open_uniform(rng, batch))
        log_cubed = log(np.where(cubed > 0.0, cubed, 1.0))
        accepted = (cubed > 0.0) & (log_uniform < 0.5 * x * x + d - d * cubed + d * log_cubed)
        return np.asarray(log(np.full(1, d)) + log_cubed[accepted])

    found = draw_accepted(count, draw, "gamma variate")
    return found if shape >= 1.0 else found + log(open_uniform(rng, count)) / shape


def permutation(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """The numbers below `count` in random order."""
    return np.argsort(rng.random(count), kind="stable")


def apportion(weights: Floats, total: int) -> NDArray[np.int64]:
    """`total` things shared out by weight, by largest remainder; ties go to the first."""
    exact = shares(weights) * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:missing]] += 1
    return counts
