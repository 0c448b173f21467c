"""Small simulations whose results are kept, so that a change in them is seen and explained.

`scripts/golden` writes golden.json anew.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.ledger import OUTCOMES
from loraserve.simulator.links import LinkSpeed
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Failure, Scenario
from placement.latency import LatencyModel, RankKernel
from placement.types import ReplicaId
from tests.support.simulated import digest, replicas_of, scenario_of
from traces.columns import columns_of
from traces.read import bundled_trace
from traces.synthesis.tiling import scale_rate

FILE = Path(__file__).with_name("golden.json")
PROFILE = "a100-llama2-7b-bgmv-42"
"""What the policies of the golden runs that plan by rank know of replicas, but for its latency model."""

LINK = LinkSpeed(bytes_per_s=100e6, latency_s=0.01)


def scenarios() -> dict[str, Scenario]:
    """The runs by name: the bundled trace on three small replicas."""
    trace = columns_of(bundled_trace())
    latency = LatencyModel(
        kernel=RankKernel.SUM,
        base_ms=8,
        row_ms=0.1,
        prefill_token_ms=0.06,
        context_token_ms=0.0005,
        decode_rank_ms=0.004,
        prefill_rank_ms=0.0004,
    )
    limits = ReplicaLimits(kv_blocks=400, max_num_seqs=12, adapter_slots=4)
    plain = scenario_of(trace, replicas_of(3, latency=latency, limits=limits))
    padded = replace(latency, kernel=RankKernel.PADDED_CONFIG)
    batch = replace(latency, kernel=RankKernel.PADDED_BATCH)
    pool = replace(limits, pool_adapters=3, load_bytes_per_s=1e9)
    failures = (
        Failure(at_s=4.0, replica_id=ReplicaId("r0"), down_s=3.0),
        Failure(at_s=9.0, replica_id=ReplicaId("r1"), down_s=1.0),
    )
    profiles = {PROFILE: replace(find_simulatable(PROFILE), latency=batch)}
    kinds = tuple(
        replace(one, spec=replace(one.spec, profile=PROFILE))
        for one in replicas_of(3, latency=batch, limits=limits)
    )
    known = replace(
        plain, replicas=kinds, profiles=profiles, origin=LINK, peer=LINK, epoch_s=2.0, window_s=2.0
    )
    return {
        "plain": plain,
        "overload": replace(
            plain, trace=scale_rate(trace, 150.0), num_routers=3, report_delay_s=0.05, max_waiting=5
        ),
        "padded-weighted": replace(
            plain, replicas=replicas_of(3, latency=padded, limits=limits), routing="weighted-share"
        ),
        "cold-slora": replace(plain, policy="slora-random", warm=False, origin=LINK, peer=LINK, epoch_s=5.0),
        "loraserve": replace(known, policy="loraserve", routing="weighted-share", forecast="loraserve"),
        "optimal": replace(known, policy="optimal", routing="marginal-cost"),
        "failures": replace(plain, failures=failures, num_routers=2, origin=LINK),
        "on-demand": replace(
            plain,
            replicas=replicas_of(3, latency=latency, limits=pool),
            on_demand=True,
            origin=LINK,
            peer=LINK,
        ),
    }


def outcome_of(scenario: Scenario) -> dict[str, object]:
    """What is kept of a run: its digest, and what helps to see what changed."""
    result = simulate(scenario)
    waited_ms = (result.first_ps - result.arrival_ps)[result.first_ps >= 0] / 1e9
    return {
        "sha256": digest(result),
        "outcomes": dict(sorted(Counter(OUTCOMES[place].value for place in result.outcome.tolist()).items())),
        "ttft_ms": [round(float(value), 3) for value in np.percentile(waited_ms, (50, 95))],
        "end_s": round(float(result.end_ps.max()) / 1e12, 3),
        "sent": int(result.attempts.sum()),
        "table_version": result.epochs[-1].table_version,
        "bytes_moved": result.bytes_moved,
        "cold_misses": result.cold_misses,
        "runs_of_steps": sum(len(log.run_ps) for log in result.logs),
    }


def main() -> None:
    """Write the file anew."""
    kept = {name: outcome_of(scenario) for name, scenario in scenarios().items()}
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
