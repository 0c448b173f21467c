"""A latency model from operating points alone, by scaling another.

Pure. This is the rule behind the shipped profiles whose latency model is called derived.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from placement.latency import COEFFICIENTS, LatencyModel, RankKernel
from placement.profile import OperatingPoint
from placement.steady_load import SteadyLoad, steady_tokens_per_s, step_terms_ms

_RANK_TERMS = ("decode_rank_ms", "prefill_rank_ms")
_OTHER_TERMS = tuple(name for name in COEFFICIENTS if name not in _RANK_TERMS)


def derive_latency(
    anchor: LatencyModel, points: Sequence[OperatingPoint], load: SteadyLoad
) -> tuple[LatencyModel, float]:
    """The anchor with its terms of rank times one factor and all others times another, so chosen that its
    steady state gives the operating points with the least squares of relative deviations; and the
    largest relative deviation. Neither factor is negative.

    ValueError without points.
    """
    import numpy as np
    from scipy.optimize import lsq_linear

    if not points:
        raise ValueError("no operating points to derive a latency model from")
    fixed_ms, per_rank_ms = step_terms_ms(anchor, load)
    padded = anchor.kernel is RankKernel.PADDED_CONFIG
    ranks = np.array([anchor.max_lora_rank if padded else point.rank for point in points], dtype=float)
    measured_ms = 1e3 * load.tokens_per_step / np.array([point.tokens_per_s for point in points])
    columns = np.stack([fixed_ms / measured_ms, per_rank_ms * ranks / measured_ms], axis=1)
    # Without a rank's share to tell apart, both terms get the same factor.
    apart = per_rank_ms > 0 and len(set(ranks)) > 1
    if not apart:
        columns = columns.sum(axis=1, keepdims=True)
    factors = lsq_linear(columns, np.ones(len(points)), bounds=(0, np.inf)).x
    fixed, per_rank = float(factors[0]), float(factors[-1])
    changes: dict[str, Any] = {name: _rounded(getattr(anchor, name) * fixed) for name in _OTHER_TERMS}
    changes |= {name: _rounded(getattr(anchor, name) * per_rank) for name in _RANK_TERMS}
    model = dataclasses.replace(anchor, **changes)
    deviations = [
        abs(steady_tokens_per_s(model, load, point.rank) / point.tokens_per_s - 1) for point in points
    ]
    return model, max(deviations)


def _rounded(value_ms: float) -> float:
    """To four digits, as a file shows it."""
    return float(f"{value_ms:.4g}")
