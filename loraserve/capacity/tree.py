"""What was found, as a tree for JSON."""

from typing import Any

from loraserve.capacity.answers import CONFIDENCE, Answer, Candidate, CurvePoint, Found, share_sure
from loraserve.capacity.slo import FIGURES
from loraserve.capacity.trials import TrialFigures
from traces.summary_json import finite


def tree_of(found: Found) -> dict[str, Any]:
    """The whole of it, for `json.dumps(..., allow_nan=False)`; infinite figures are "inf"."""
    judged = found.target.judged_by
    return {
        "slo": found.target.text,
        "bounds": [
            {"figure": one.figure, "sign": one.sign, "limit": one.limit} for one in found.target.clauses
        ],
        "judged_by": {"ttft_ms": judged.ttft_ms, "tbt_ms": judged.tbt_ms},
        "seeds": list(found.seeds),
        "what_if": list(found.what_if),
        "notes": list(found.notes),
        "best": _answer(found.best),
        "answers": [_answer(answer) for answer in found.answers],
        "candidates": [_candidate(one) for one in found.candidates],
        "price": None
        if found.price is None
        else {
            "per_gpu_hour": found.price.per_gpu_hour,
            "gpus_per_replica": found.price.gpus_per_replica,
        },
        "workload": dict(found.workload),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    best, nearest = answer.best, answer.nearest
    shown = best or nearest
    return {
        "policy": answer.policy,
        "what_if": answer.what_if,
        "replicas": answer.replicas,
        "max_lora_ranks": None if best is None else list(best.mix),
        "held_seeds": 0 if shown is None else shown.num_held,
        "seeds": 0 if shown is None else len(shown.held),
        "share_of_seeds_at_least": None if best is None else share_sure(best.num_held, len(best.held)),
        "confidence": CONFIDENCE,
        "worst": None if best is None else {name: finite(best.worst(name)) for name in FIGURES},
        "nearest": None if nearest is None else _candidate(nearest),
        "fluid_replicas": answer.lower_bound,
        "proof": answer.proof,
        "notes": list(answer.notes),
        "per_hour": answer.per_hour,
        "per_million_tokens": answer.per_million_tokens,
        "per_million_output_tokens": answer.per_million_output_tokens,
        "curve": [_point(point) for point in answer.curve],
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "policy": one.policy,
        "what_if": one.what_if,
        "replicas": one.replicas,
        "max_lora_ranks": list(one.mix),
        "holds": one.holds,
        "held_seeds": one.num_held,
        "bound_used": finite(one.used),
        "by_seed": [
            {"seed": seed, "held": one.held[seed], **_figures(found)} for seed, found in one.figures.items()
        ],
    }


def _figures(found: TrialFigures) -> dict[str, Any]:
    return {
        **{name: finite(found.figures.get(name)) for name in FIGURES},
        "gave_up_ttft_p95_above_ms": found.gave_up_ms,
        "requests": found.requests,
        "failed": found.failed,
        "tokens_per_s": found.tokens_per_s,
        "output_tokens_per_s": found.output_tokens_per_s,
        "utilisation": found.utilisation,
    }


def _point(point: CurvePoint) -> dict[str, Any]:
    return {
        "kind": point.kind,
        "factor": point.factor,
        "slo": point.target.text,
        "replicas": point.replicas,
        "tried_up_to": point.tried,
        "per_hour": point.per_hour,
    }
