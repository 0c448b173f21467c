"""What policies know of a simulated replica fits what is simulated: kernel, speed and operating points."""

from dataclasses import replace

import numpy as np
import pytest

from loraserve.profiling.files import find_simulatable
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.run import simulate
from loraserve.simulator.workload import SimulatedWorkload
from placement.latency import RankKernel
from placement.profile import Profile
from traces.columns import TraceColumns

MIXED, STOCK = "a100-llama2-7b-bgmv-42", "vllm-llama-3.1-8b"


def one_rank(rank: int) -> TraceColumns:
    return SimulatedWorkload(
        source="preset:loraserve-uniform", requests=400, adapters=1, ranks=str(rank)
    ).draw(0)


def known(name: str, options: ClusterOptions) -> Profile:
    return scenario_of(find_simulatable(name), one_rank(8), options).profiles[name]


def points(profile: Profile) -> dict[int, float]:
    return {point.rank: point.tokens_per_s for point in profile.operating_points}


def saturated_tokens_per_s(name: str, rank: int, options: ClusterOptions) -> float:
    trace = one_rank(rank)
    at_once = replace(trace, arrival_s=np.arange(len(trace), dtype=np.float64) * 1e-6)
    made = scenario_of(find_simulatable(name), at_once, replace(options, num_replicas=1))
    end_ps = simulate(replace(made, max_waiting=None)).end_ps
    return float((trace.prompt_tokens + trace.output_tokens).sum() / (end_ps.max() / 1e12))


def test_without_a_kernel_of_its_own_the_profile_is_what_policies_know() -> None:
    assert known(MIXED, ClusterOptions()) == find_simulatable(MIXED)


@pytest.mark.parametrize("kernel", ["sum", "padded_config"])
def test_one_rank_alone_costs_the_same_under_every_kernel(kernel: str) -> None:
    other = known(MIXED, ClusterOptions(kernel=kernel))
    assert other.latency is not None
    assert other.latency.kernel is RankKernel(kernel)
    assert points(other) == pytest.approx(points(find_simulatable(MIXED)))


def test_points_of_an_engine_that_padded_rise_below_its_setting_as_simulated() -> None:
    measured, other = find_simulatable(STOCK), known(STOCK, ClusterOptions(kernel="sum"))
    lowest, highest = min(points(measured)), measured.engine.max_lora_rank
    assert other.operating_point(highest) == pytest.approx(measured.operating_point(highest))
    told = other.operating_point(lowest) / measured.operating_point(lowest)
    plain, summed = ClusterOptions(), ClusterOptions(kernel="sum")
    simulated = saturated_tokens_per_s(STOCK, lowest, summed) / saturated_tokens_per_s(STOCK, lowest, plain)
    assert told == pytest.approx(simulated, rel=0.03)


def test_twice_the_speed_is_twice_the_tokens() -> None:
    fast = known(MIXED, ClusterOptions(speed=2.0))
    assert points(fast) == {rank: 2 * value for rank, value in points(find_simulatable(MIXED)).items()}
    assert fast.latency is not None
    assert fast.latency.base_ms == find_simulatable(MIXED).latency.base_ms / 2  # type: ignore[union-attr]
