"""The load at which a latency model saturates; and a model from operating points alone, by scaling another.

Pure. This is the rule behind the shipped profiles whose latency model is called derived.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from placement.latency import COEFFICIENTS, LatencyModel, RankKernel
from placement.profile import OperatingPoint

_RANK_TERMS = ("decode_rank_ms", "prefill_rank_ms")
_OTHER_TERMS = tuple(name for name in COEFFICIENTS if name not in _RANK_TERMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyLoad:
    """A replica that always has `rows` requests to decode, all of these lengths and of one adapter."""

    rows: int
    prompt_tokens: float
    output_tokens: float


def steady_tokens_per_s(model: LatencyModel, load: SteadyLoad, rank: int) -> float:
    """Prompt and output tokens/s in the steady state, if the replica never lacks requests.

    Each step draws a token for each row, so that `rows / output_tokens` requests end and as many prompts
    are computed beside.
    """
    fixed_ms, per_rank_ms = _step_terms(model, load)
    charged = model.max_lora_rank if model.kernel is RankKernel.PADDED_CONFIG else rank
    return 1e3 * _tokens_per_step(load) / (fixed_ms + per_rank_ms * charged)


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
    fixed_ms, per_rank_ms = _step_terms(anchor, load)
    padded = anchor.kernel is RankKernel.PADDED_CONFIG
    ranks = np.array([anchor.max_lora_rank if padded else point.rank for point in points], dtype=float)
    measured_ms = 1e3 * _tokens_per_step(load) / np.array([point.tokens_per_s for point in points])
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


def _step_terms(model: LatencyModel, load: SteadyLoad) -> tuple[float, float]:
    """A steady step's milliseconds without rank, and per unit of the rank charged."""
    prompts = load.rows / load.output_tokens
    fixed_ms = (
        model.base_ms
        + model.row_ms * (load.rows + prompts)
        + model.prefill_token_ms * prompts * load.prompt_tokens
        + model.prefill_pair_ms * prompts * load.prompt_tokens**2 / 2
        + model.context_token_ms * load.rows * (load.prompt_tokens + load.output_tokens / 2)
        + model.lora_step_ms
        + model.adapter_ms
    )
    rank_ms = model.decode_rank_ms * load.rows + model.prefill_rank_ms * prompts * load.prompt_tokens
    return fixed_ms, rank_ms


def _tokens_per_step(load: SteadyLoad) -> float:
    return load.rows * (1 + load.prompt_tokens / load.output_tokens)


def _rounded(value_ms: float) -> float:
    """To four digits, as a file shows it."""
    return float(f"{value_ms:.4g}")
