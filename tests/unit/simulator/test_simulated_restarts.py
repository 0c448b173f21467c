"""Simulated replicas that are drained and restarted with the `max_lora_rank` that is planned for them."""

from dataclasses import replace

import numpy as np
import pytest

from loraserve.errors import BadInputError
from loraserve.simulator.from_profile import ClusterOptions
from loraserve.simulator.from_profile import scenario_of as of_profile
from loraserve.simulator.run import Simulation
from loraserve.simulator.scenario import Failure, Scenario
from placement.cluster.invariants import check_cluster
from placement.latency import LatencyModel, RankKernel
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import ReplicaId
from tests.support.simulated import digest, poisson_trace, replicas_of, scenario_of

MODEL = LatencyModel(
    kernel=RankKernel.PADDED_CONFIG,
    base_ms=5,
    prefill_token_ms=0.02,
    decode_rank_ms=0.01,
    prefill_rank_ms=0.001,
)
PROFILE = Profile(
    name="kind",
    source="made up",
    engine=EngineFacts(kind="vllm", model="m", kv_blocks=1000),
    latency=MODEL,
    latency_basis="derived",
    operating_points=(
        OperatingPoint(rank=8, tokens_per_s=4000.0),
        OperatingPoint(rank=128, tokens_per_s=1500.0),
    ),
)


def _scenario(**options: object) -> Scenario:
    """Three replicas set to 128; one request in ten is for the adapter of rank 128."""
    trace = poisson_trace(1500, 10, num_adapters=5, seed=3)
    rng = np.random.default_rng(1)
    place = np.where(rng.random(len(trace)) < 0.1, 4, rng.integers(0, 2, len(trace))).astype(np.int32)
    trace = replace(trace, adapter=place)
    setups = [
        replace(setup, spec=replace(setup.spec, profile="kind")) for setup in replicas_of(3, latency=MODEL)
    ]
    given: dict[str, object] = {
        "epoch_s": 20.0,
        "window_s": 20.0,
        "restart_s": 5.0,
        "profiles": {"kind": PROFILE},
    }
    return scenario_of(trace, setups, **(given | options))


def test_replicas_come_to_lower_settings_and_no_request_fails() -> None:
    fixed = Simulation(_scenario()).run()
    simulation = Simulation(_scenario(max_lora_ranks="planned"))
    planned = simulation.run()
    check_cluster(simulation.shell.state)
    assert (planned.outcome == 0).all()
    specs = {record.replica_id: record.spec for record in simulation.shell.state.replicas.values()}
    settings = sorted(spec.max_lora_rank for spec in specs.values() if spec is not None)
    assert settings[-1] == 128
    assert settings[0] in (8, 16)
    late = planned.arrival_ps > 100e12

    def mean_s(result: object) -> float:
        return float((result.end_ps - result.arrival_ps)[late].mean())  # type: ignore[attr-defined]

    assert mean_s(planned) < 0.9 * mean_s(fixed)
    assert digest(planned) == digest(Simulation(_scenario(max_lora_ranks="planned")).run())


def test_deaths_while_replicas_restart_do_no_harm() -> None:
    deaths = tuple(
        Failure(at_s=at_s, replica_id=ReplicaId(f"r{place}"), down_s=1.0)
        for at_s, place in ((20.02, 2), (41.0, 1), (60.5, 0))
    )
    simulation = Simulation(_scenario(max_lora_ranks="planned", failures=deaths))
    result = simulation.run()
    check_cluster(simulation.shell.state)
    assert (result.outcome == 0).all()
    assert (result.attempts[result.outcome == 0] >= 1).all()


def test_planned_settings_need_operating_points() -> None:
    with pytest.raises(BadInputError, match="has no operating points to choose by"):
        of_profile(
            replace(PROFILE, operating_points=()), _scenario().trace, ClusterOptions(max_lora_ranks="planned")
        )
    with pytest.raises(BadInputError, match="max_lora_ranks: 'later'; expected fixed or planned"):
        _scenario(max_lora_ranks="later")
    with pytest.raises(BadInputError, match="migration: 'on'; expected off or dlora"):
        _scenario(migration="on")
