"""Mixes of `max_lora_rank`: what may be asked for, and what is proposed."""

import pytest

from loraserve.capacity.mixes import MAX_MIXES, Asked, Mixes, lowest_setting, mix_text
from loraserve.errors import BadInputError
from loraserve.profiling.files import find_simulatable
from loraserve.simulator.from_profile import ClusterOptions, scenario_of
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.workload import SimulatedWorkload
from placement.latency import RankKernel

PROFILE = find_simulatable("a100-llama2-7b-bgmv-42")


def scenario(seed: int = 0, ranks: str = "8,16,32,64,128") -> Scenario:
    trace = SimulatedWorkload(
        source="preset:loraserve-skew", rate_per_s=20.0, duration_s=40.0, adapters=10, ranks=ranks
    ).draw(seed)
    options = ClusterOptions(num_replicas=1, kernel="padded_config", epoch_s=10.0)
    return scenario_of(PROFILE, trace, options, seed=seed)


def test_what_is_asked_for() -> None:
    assert Asked.parse("auto") == Asked()
    assert Asked.parse("128") == Asked(rank=128)
    assert Asked.parse("128x1, 16 x 3") == Asked(mix=(16, 16, 16, 128))
    assert Asked.parse("16,128") == Asked(mix=(16, 128))
    assert Asked.parse("64x2") == Asked(mix=(64, 64))
    assert mix_text((16, 16, 16, 128)) == "3 x 16, 1 x 128"


@pytest.mark.parametrize("text", ["", "0", "16x0", "16x", "x3", "16x3,", "-8", "16x3x2", "auto,16"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(
        BadInputError, match=r"--max-lora-ranks: .* expected auto, one such as 128, or such as"
    ):
        Asked.parse(text)


def test_proposals_take_every_rank_on_so_many_replicas_and_end_with_the_same_everywhere() -> None:
    mixes = Mixes(uniform=128, scenarios=(scenario(0), scenario(1)))
    for number in range(1, 9):
        found = mixes.of(number)
        assert 1 <= len(found) == len(set(found)) <= MAX_MIXES
        assert found[-1] == (128,) * number
        assert all(len(mix) == number and max(mix) == 128 and list(mix) == sorted(mix) for mix in found)
    assert len(mixes.of(8)) > 1
    assert mixes.of(8) is mixes.of(8)


def test_a_rank_keeps_a_replica_when_some_are_lost() -> None:
    mixes = Mixes(uniform=128, scenarios=(scenario(),), num_lost=2)
    assert all(mix.count(128) >= 3 for mix in mixes.of(8))


def test_without_demand_to_go_by_all_replicas_are_set_alike() -> None:
    assert Mixes(uniform=64).of(3) == ((64, 64, 64),)
    assert Mixes(uniform=64, exactly=(8, 64)).of(7) == ((8, 64),)


def test_one_setting_for_all_is_the_lowest_that_takes_every_rank() -> None:
    assert [lowest_setting(ranks, 128) for ranks in ([8, 20], [], [128], [100])] == [32, 1, 128, 128]
    assert lowest_setting([48], 50) == 50


def test_each_replica_has_its_own_setting_and_the_cost_of_it() -> None:
    options = ClusterOptions(num_replicas=3, kernel="padded_config", replica_ranks=(16, 64, 128))
    made = scenario_of(PROFILE, scenario().trace, options)
    assert [setup.spec.max_lora_rank for setup in made.replicas] == [16, 64, 128]
    assert [setup.cost.max_lora_rank for setup in made.replicas] == [16, 64, 128]
    assert {setup.cost.kernel for setup in made.replicas} == {RankKernel.PADDED_CONFIG}


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        ((16, 128), "replica_ranks: 2; expected one for each of 3"),
        ((16, 64, 256), "max_lora_rank: 256; expected from 1 to 128"),
        ((0, 64, 128), "max_lora_rank: 0; expected from 1 to 128"),
        ((16, 64, 64), "has rank 128, no replica takes more than 64"),
    ],
)
def test_settings_that_do_not_fit_are_refused(ranks: tuple[int, ...], line: str) -> None:
    options = ClusterOptions(num_replicas=3, kernel="padded_config", replica_ranks=ranks)
    with pytest.raises(BadInputError, match=line):
        scenario_of(PROFILE, scenario().trace, options)
