"""A small experiment whose results are kept: every kernel, a policy of each family, searches included.

`scripts/golden` writes golden_experiments.json anew.
"""

import hashlib
import json
from pathlib import Path

from loraserve.experiments.jobs import Job, jobs_of_experiment
from loraserve.experiments.measure import measure
from loraserve.experiments.results import to_json
from loraserve.experiments.spec import parse_experiment
from tests.support.experiments import small_tree

FILE = Path(__file__).with_name("golden_experiments.json")


def jobs() -> dict[str, Job]:
    """The jobs by their names."""
    experiment = parse_experiment(
        small_tree(
            traces=[
                {"name": "slide", "source": "preset:loraserve-skewslide", "adapters": 10},
                {
                    "name": "demo",
                    "source": "demo",
                    # So many that some are left after the warm-up at the highest rate that is tried.
                    "requests": 800,
                    "adapters": 6,
                    "assign": "zipf",
                    "correlation": 1.0,
                },
            ],
            policies=["optimal", "loraserve", "least-loaded", "rank-backlog"],
            rates=["0.9x"],
            seeds=[3],
            kernels=["padded_batch", "padded_config", "sum"],
        )
    )
    return {job.label: job for job in jobs_of_experiment(experiment, Path())}


def kept_of(job: Job) -> dict[str, object]:
    """What is kept of a job: the digest of all, and what helps to see what changed."""
    found = measure(job)
    return {
        "sha256": hashlib.sha256(to_json(found)).hexdigest(),
        "ttft_p95_ms": [point.ttft_p95_ms for point in found.points],
        "bytes_moved": [point.bytes_moved for point in found.points],
        "highest_per_s": found.highest.held_per_s if found.highest else None,
        "fewest_replicas": [fewest.replicas for fewest in found.fewest],
    }


def main() -> None:
    """Write the file anew."""
    kept = {name: kept_of(job) for name, job in jobs().items()}
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
