"""How close the simulator comes to live clusters: `loraserve fidelity`, and each figure's worst error."""

from collections.abc import Callable, Sequence
from typing import Any

import bench_common as common


def fidelity(engines: Sequence[str], *, quick: bool, note: Callable[[str], None]) -> dict[str, Any]:
    """Per engine, the worst errors over the loads scored, relative to the live cluster, and the fit."""
    found = {}
    for engine in engines:
        note(f"comparing the simulator with a live cluster of {engine} replicas")
        told = common.loraserve("simulator", "fidelity", "--engine", engine, *(("--quick",) if quick else ()))
        found[engine] = summary(told)
    return found


def summary(told: dict[str, Any]) -> dict[str, Any]:
    """What one comparison comes to; an error that is no number is None."""
    scored = told["scored"]
    return {
        "worst_error": {name: _rounded(error) for name, error in told["worst"].items()},
        "targets": told["targets"],
        "met": told["met"],
        "missed": [
            f"{name} at load {load['load']:g}"
            for load in scored
            for name, one in load["figures"].items()
            if one["met"] is False and not load["void_reason"]
        ],
        "fit_is_void": bool(told["fitted"]["void_reason"]),
        "void_loads": [load["load"] for load in scored if load["void_reason"]],
        "step_factor": _rounded(told["fit"]["overheads"]["step_factor"]),
        "prefill_factor": _rounded(told["fit"]["overheads"]["prefill_factor"]),
        "message_delay_ms": _rounded(1e3 * told["fit"]["overheads"]["message_delay_s"]),
        "saturation_requests_per_s": _rounded(told["saturation"]["requests_per_s"]),
        "latency_source": told["latency_source"],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
