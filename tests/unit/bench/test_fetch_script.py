"""The parts of scripts/bench/fetch, each so small that it takes a second or two."""

import importlib.util
from pathlib import Path

import fetch_netns
import fetch_shaped
import pytest
from fetch_bench import PARTS
from fetch_resident import ResidentOptions, measure_resident
from fetch_serving import MAX_TRIES, Calm, ServingOptions, measure_first_token, measure_tbt, stage
from fetch_shaped import ShapedOptions, measure_shaped
from fetch_transports import TransportsOptions, measure_transports
from policies_runs import runner

MIB = 1024**2
TINY = ServingOptions(
    hidden=128, layers=1, rank=16, prompt_tokens=8, repetitions=1, windows=1, window_s=0.2, engine="emulated"
)


async def test_transports_are_measured_beside_bare_loops_in_turn(tmp_path: Path) -> None:
    found = await measure_transports(TransportsOptions(sizes_mib=(1,), rounds=1, transfers=1), tmp_path)
    has_ucx = importlib.util.find_spec("ucxx") is not None
    kinds = {"tcp", "ucx_shm", "ucx_tcp"} if has_ucx else {"tcp"}
    assert found["bytes_per_s"].keys() == kinds == found["fabric_bytes_per_s"].keys()
    for kind in kinds:
        assert found[f"{kind}_share_of_bare"] == found["shares_of_bare"][kind]["1MiB"] > 0
        assert found["bytes_per_s"][kind]["1MiB"] > 0
        assert found["fabric_bytes_per_s"][kind]["1MiB"] > 0
    assert (found["ucx_shm_over_tcp"] is None) == (not has_ucx)
    assert ("ucxx" in found["transports_left_out"].get("ucx_shm", "")) == (not has_ucx)


@pytest.mark.parametrize(("delay_ms", "name"), [(0.0, "1_gbit_per_s"), (1.0, "1_gbit_per_s_1_ms")])
async def test_a_shaped_link_is_used_and_taken_away_again(tmp_path: Path, delay_ms: float, name: str) -> None:
    if reason := fetch_netns.why_not():
        pytest.skip(reason)
    if delay_ms and not fetch_netns.has_tun():
        pytest.skip("no /dev/net/tun here")
    found = await measure_shaped(ShapedOptions(links=((1, delay_ms, 4 * MIB),), repetitions=1), tmp_path)
    assert 0 < found["shaped_share"][name]["tcp"] < 1.1
    assert fetch_netns.namespaces() == []


async def test_without_root_shaped_links_are_skipped_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_shaped, "why_not", lambda: "network namespaces need root")
    found = await measure_shaped(ShapedOptions(), tmp_path)
    assert found == {"shaped_share": None, "shaped_skipped": "network namespaces need root"}


def test_what_replicas_hold_is_told_beside_what_everything_everywhere_takes() -> None:
    options = ResidentOptions(workloads=("skew",), fleets=((25, 4),), duration_s=40.0, warmup_s=10.0)
    with runner(1, lambda text: None) as simulations:
        found = measure_resident(options, simulations)
    fleet = found["resident_bytes"]["25_adapters_4_replicas"]
    everywhere = fleet["least-loaded"]
    assert everywhere["share_of_everywhere"] == 1.0
    assert everywhere["copies"] == 4.0
    assert fleet["optimal_room_for_2"]["copies"] <= 2.0
    assert fleet["loraserve_room_for_2"]["copies"] <= 2.0
    assert all(0 < one["attainment"] <= 1 for one in fleet.values())
    assert len(found["resident_bytes_runs"]) == 5


async def test_a_replica_takes_adapters_from_its_peer_while_it_serves(tmp_path: Path) -> None:
    async with stage(TINY, tmp_path) as on:
        cold = await measure_first_token(on, TINY)
        beside = await measure_tbt(on, TINY)
        assert cold["cold_first_token_ms"] > cold["cold_load_ms"] > cold["cold_transfer_ms"] > 0
        assert beside["tbt_with_fetch"] > 0
        assert beside["tbt_fetches_per_s"] > 0
        on.replica.server.check_invariants(idle=True)
        on.replica.fabric.check_invariants(idle=True)


def test_of_repetitions_those_count_that_were_left_alone() -> None:
    calm: Calm[str] = Calm(2)
    for others_cpu, value in ((0.5, "a"), (0.01, "b"), (0.3, "c"), (0.02, "d")):
        assert not calm.is_enough
        calm.add(others_cpu, value)
    assert calm.is_enough
    assert calm.values == ["b", "d"]
    assert calm.others_cpu == 0.02


def test_a_machine_that_is_never_quiet_is_measured_all_the_same() -> None:
    calm: Calm[int] = Calm(2)
    for number in range(2 * MAX_TRIES):
        assert not calm.is_enough
        calm.add(0.9 - number / 100, number)
    assert calm.is_enough
    assert calm.values == [2 * MAX_TRIES - 1, 2 * MAX_TRIES - 2]


def test_every_part_is_described() -> None:
    text = (Path(__file__).resolve().parents[3] / "scripts/bench/fetch_bench.py").read_text()
    assert all(f"\n  {part} " in text for part in PARTS)
