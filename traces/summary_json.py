"""The JSON form of a summary, with the keys of `vllm bench serve` wherever it has one.

An infinite figure is the string "inf"; null means that there was nothing to measure.
"""

import math
from typing import Any

from traces.metrics import GroupSummary, Summary
from traces.records import Outcome


def summary_to_json(summary: Summary) -> dict[str, Any]:
    """The whole summary as a tree that `json.dumps(..., allow_nan=False)` takes."""
    pacing = summary.pacing
    return {
        "duration": summary.duration_s,
        "warmup_requests": summary.warmup_requests,
        "slo": {"ttft_ms": summary.slo.ttft_ms, "tbt_ms": summary.slo.tbt_ms},
        "void": summary.void,
        "void_reason": summary.void_reason,
        "pacing": None
        if pacing is None
        else {
            "requests": pacing.requests,
            "p50_ms": finite(pacing.p50_ms),
            "p99_ms": finite(pacing.p99_ms),
            "max_ms": finite(pacing.max_ms),
        },
        "overall": group_to_json(summary.overall),
        "per_rank": {name: group_to_json(group) for name, group in summary.per_rank.items()},
        "per_adapter": {name: group_to_json(group) for name, group in summary.per_adapter.items()},
    }


def group_to_json(group: GroupSummary) -> dict[str, Any]:
    """One group, flat: counts, rates, and `mean_`, `median_`, `p95_`, `p99_` of each latency."""
    tree: dict[str, Any] = {
        "requests": group.requests,
        "completed": group.completed,
        **{outcome.value: group.outcomes.get(outcome, 0) for outcome in Outcome if outcome is not Outcome.OK},
        "total_input_tokens": group.total_input_tokens,
        "total_output_tokens": group.total_output_tokens,
        "request_throughput": group.request_throughput,
        "request_goodput": group.request_goodput,
        "output_throughput": group.output_throughput,
        "total_token_throughput": group.total_token_throughput,
        "attainment": group.attainment,
        "slo_met": group.slo_met,
        "tokens_per_message": group.tokens_per_message,
    }
    latencies = {
        "ttft": group.ttft_ms,
        "ttft_from_send": group.ttft_from_send_ms,
        "tpot": group.tpot_ms,
        "itl": group.itl_ms,
        "e2el": group.e2el_ms,
    }
    for name, sample in latencies.items():
        tree[f"mean_{name}_ms"] = finite(sample.mean)
        tree[f"median_{name}_ms"] = finite(sample.median)
        tree[f"p95_{name}_ms"] = finite(sample.p95)
        tree[f"p99_{name}_ms"] = finite(sample.p99)
    return tree


def finite(value: float | None) -> float | str | None:
    """The value as JSON can carry it."""
    return "inf" if value is not None and math.isinf(value) else value
