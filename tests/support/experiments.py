"""A small experiment that is over in a second or two."""

from typing import Any


def small_tree(**changes: Any) -> dict[str, Any]:
    """An experiment as plain values: one workload, two policies and seeds, everything searched."""
    return {
        "title": "A small one",
        "traces": [{"name": "uniform", "source": "preset:loraserve-uniform", "adapters": 5}],
        "policies": ["optimal", "slora-random"],
        "replicas": [2],
        "rates": ["0.6x", "1.1x"],
        "seeds": [0, 1],
        "kernels": ["padded_batch"],
        "cluster": {"duration_s": 12.0, "warmup_s": 2.0, "epoch_s": 3.0},
        "find": {
            "highest_rate": True,
            "tolerance": 0.1,
            "fewest_replicas_at": [8.0],
            "most_replicas": 3,
        },
        **changes,
    }
