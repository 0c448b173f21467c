"""Live comparisons of placement policies: what is kept of a run, what makes it void, what replicas cost."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import policies_cases as cases
import policies_vllm
import pytest
from policies_cases import Case, Setting
from policies_live import Measured, read_result, result_path

from placement.latency import LatencyModel, RankKernel, StepCounts

SHORT = Setting(duration_s=10.0, warmup_s=2.0, epoch_s=5.0)


def case_of(setting: Setting = SHORT, rate_per_s: float = 5.0) -> Case:
    (contender,) = cases.available([cases.OURS])
    return Case(
        contender=contender,
        workload=cases.WORKLOADS["slide"],
        rate_per_s=rate_per_s,
        seed=0,
        setting=setting,
    )


def tree_of(case: Case, **changed: Any) -> dict[str, Any]:
    """What a run of this case would write, had nothing gone wrong."""
    outcome = asdict(cases.run_case(case_of()))
    how = {"pacing_p99_ms": 9.0, "busy": 0.5, "others": 0.05, "step_factor": 1.0, "settings": [[128]]}
    return {"case": cases.case_tree(case), "outcome": outcome, "start_s": 1.0, "run_s": 1.0} | how | changed


def kept(case: Case, folder: Path, tree: dict[str, Any]) -> Measured | None:
    result_path(case, folder).write_text(json.dumps(tree))
    return read_result(case, folder)


def test_only_the_result_of_the_very_case_is_taken_for_it(tmp_path: Path) -> None:
    case = case_of()
    assert read_result(case, tmp_path) is None
    done = kept(case, tmp_path, tree_of(case))
    assert done is not None
    assert done.void == ""
    assert done.outcome == cases.run_case(case)
    assert read_result(case_of(rate_per_s=6.0), tmp_path) is None
    assert kept(case, tmp_path, tree_of(case_of(rate_per_s=6.0))) is None
    result_path(case, tmp_path).write_text('{"case"')
    assert read_result(case, tmp_path) is None


@pytest.mark.parametrize(
    ("fleet", "speed", "changed", "is_void"),
    [
        ("padded_batch", 1.0, {"pacing_p99_ms": 11.0}, True),
        # Steps take twice as long: half as much of them is late.
        ("padded_batch", 0.5, {"pacing_p99_ms": 11.0}, False),
        ("padded_batch", 1.0, {"step_factor": 1.06}, True),
        ("padded_config_planned", 1.0, {"step_factor": None}, False),
        # Engines that sleep are not slowed down by others, those that compute are.
        ("padded_batch", 1.0, {"others": 0.4}, False),
        ("vllm_uniform", 1.0, {"others": 0.4}, True),
        ("vllm_uniform", 1.0, {"step_factor": 1.06}, False),
    ],
)
def test_a_run_that_proves_nothing_is_void(
    tmp_path: Path, fleet: str, speed: float, changed: dict[str, Any], is_void: bool
) -> None:
    case = case_of(Setting(fleet=fleet, speed=speed))
    done = kept(case, tmp_path, tree_of(case, **changed))
    assert done is not None
    assert bool(done.void) == is_void


def test_a_mixed_fleet_is_simulated_as_it_is_set() -> None:
    case = case_of(Setting(fleet="vllm_mixed", replicas=2, adapters=10, duration_s=20.0))
    made = cases.scenario(case)
    assert [setup.spec.max_lora_rank for setup in made.replicas] == [128, 16]
    assert made.max_lora_ranks == "fixed"
    # Short ones, of the same adapters at the same times.
    ordinary = cases.requests(case_of(Setting(replicas=2, adapters=10, duration_s=20.0)))
    assert made.trace.arrival_s.tolist() == ordinary.arrival_s.tolist()
    assert made.trace.prompt_tokens.sum() < ordinary.prompt_tokens.sum() / 5


def test_two_settings_make_one_model_that_says_what_each_costs() -> None:
    low = LatencyModel(
        kernel=RankKernel.PADDED_CONFIG, max_lora_rank=16, base_ms=8.0, row_ms=1.0, decode_rank_ms=0.1
    )
    high = LatencyModel(
        kernel=RankKernel.PADDED_CONFIG, max_lora_rank=128, base_ms=8.0, row_ms=0.0, decode_rank_ms=0.05
    )
    model = policies_vllm.joined(low, high)
    assert model.kernel is RankKernel.PADDED_CONFIG
    for one in (low, high):
        counts = StepCounts(rows=4, decode_rank=4 * one.max_lora_rank)
        assert model.step_ms(counts) == pytest.approx(one.step_ms(counts))
