"""Fits what the cluster adds to its engines, from one live run and the simulator.

Three numbers: two factors on the latency model's step times, from the steps that the client saw, and the
delay of a message, from the first tokens of the same requests in the live run and in the simulator. Trimmed
means throughout, so that a stall of the machine counts for little.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from loraserve.fidelity.simulated import Overheads
from loraserve.fidelity.steps import StepFactors, step_factors
from placement.latency import LatencyModel
from traces.metrics import itl_ms, ttft_ms
from traces.records import RequestRecord

ROUNDS, WHOLE_ROUNDS = 8, 2
CLOSE_S = 5e-5
MAX_DELAY_S = 0.25
"""A longer message delay than this is no network's: the fit then leaves the rest unexplained."""

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Runs = Sequence[Sequence[RequestRecord]]
Predict = Callable[[Overheads], Runs]
"""What the simulator says under these overheads, in one or several runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The overheads, the steps that their factors are medians of, and what is left: the ratio of gaps
    between tokens, live over simulated (1: none), and how much later first tokens come."""

    overheads: Overheads
    steps: StepFactors
    rounds: int
    gap_ratio: float
    ttft_left_ms: float


def fit_overheads(live: Sequence[RequestRecord], predict: Predict, model: LatencyModel) -> Fit:
    """The overheads under which the prediction of this run comes closest; ValueError for a run in which
    nothing can be compared."""
    steps = step_factors(live, model)
    now, rounds = Overheads(step_factor=steps.decode, prefill_factor=steps.prefill), 0
    while True:
        rounds += 1
        simulated = predict(now)
        left_ms = first_token_left_ms(live, simulated)
        # Whole strides at first, then ever shorter ones: a little delay more lets some requests miss a step,
        # so what is left jumps about, and whole strides would follow it.
        share = 0.5 ** max(0, rounds - WHOLE_ROUNDS)
        delay_s = now.message_delay_s + share * left_ms / 2e3  # there and back: half of it each way
        delay_s = min(max(delay_s, 0.0), MAX_DELAY_S)
        if rounds == ROUNDS or abs(delay_s - now.message_delay_s) < CLOSE_S:
            break
        now = replace(now, message_delay_s=delay_s)
    ratio = gap_ratio(live, simulated)
    return Fit(overheads=now, steps=steps, rounds=rounds, gap_ratio=ratio, ttft_left_ms=left_ms)


def gap_ratio(live: Sequence[RequestRecord], simulated: Runs) -> float:
    """How many times longer the live gaps are: the geometric mean of the ratios of their deciles."""
    ours, theirs = _gaps(live), _gaps([record for run in simulated for record in run])
    if not len(ours) or not len(theirs):
        raise ValueError("no gap between two tokens to compare; requests need outputs of at least 2 tokens")
    deciles = [np.quantile(values, LEVELS) for values in (ours, theirs)]
    if min(deciles[0].min(), deciles[1].min()) <= 0:
        # Messages that came together: only the middle says something then.
        middle = [float(np.median(values)) for values in (ours, theirs)]
        return middle[0] / middle[1] if min(middle) > 0 else 1.0
    return float(np.exp(np.mean(np.log(deciles[0] / deciles[1]))))


def first_token_left_ms(live: Sequence[RequestRecord], simulated: Runs) -> float:
    """How much later the first token of the same request came in the live run than in the mean simulated
    one: the mean of the middle half of these differences, robust as their median, and smooth."""
    predicted = {
        runs[0].index: fmean(ttft_ms(record) for record in runs) for runs in zip(*simulated, strict=True)
    }
    left = sorted(
        ttft_ms(record) - predicted[record.index]
        for record in live
        if math.isfinite(ttft_ms(record)) and math.isfinite(predicted.get(record.index, math.inf))
    )
    if not left:
        raise ValueError("no request was answered in both runs")
    quarter = len(left) // 4
    return float(np.mean(left[quarter : len(left) - quarter]))


def _gaps(records: Sequence[RequestRecord]) -> NDArray[np.float64]:
    return np.array([gap for record in records for gap in itl_ms(record) if math.isfinite(gap)])
