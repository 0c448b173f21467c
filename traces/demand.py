"""A workload's demand: tokens per second of each adapter over a stretch of time, by when requests come."""

import numpy as np
from numpy.typing import NDArray

from traces.columns import BASE, TraceColumns


def demand_tokens_per_s(columns: TraceColumns, begin_s: float, end_s: float) -> NDArray[np.float64]:
    """Prompt and output tokens of the requests that come from `begin_s` on and before `end_s`, per second;
    float64, one for each of `columns.adapters`. The base model's are left out. ValueError unless the
    stretch is longer than 0."""
    if not end_s > begin_s:
        raise ValueError(f"from {begin_s} s to {end_s} s; expected an end after the beginning")
    first, last = np.searchsorted(columns.arrival_s, (begin_s, end_s))
    adapter = columns.adapter[first:last]
    tokens = columns.prompt_tokens[first:last].astype(np.int64) + columns.output_tokens[first:last]
    named = adapter != BASE
    sums = np.bincount(adapter[named], weights=tokens[named], minlength=len(columns.adapters))
    return np.asarray(sums / (end_s - begin_s), dtype=np.float64)
