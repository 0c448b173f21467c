"""The profile that a cluster plans by: a named one, or what the emulated engine's configuration gives."""

from pathlib import Path

import pytest

from loraserve.cluster.profiles import keep_profile, kept_profile, profile_of
from loraserve.config import Config, parse_config
from loraserve.errors import BadInputError
from loraserve.profiling.files import find_profile, shipped_profiles
from placement.capacity import tokens_per_s
from placement.types import ReplicaId, ReplicaSpec


def config(
    kernel: str = "padded_batch", *, profile: str = "", kind: str = "emulated", **emulated: float
) -> Config:
    return parse_config(
        {
            "model": {"path": "m"},
            "engine": {"kind": kind},
            "emulated": {"kernel": kernel, **emulated},
            "placement": {"profile": profile},
        }
    )


@pytest.mark.parametrize("kernel", ["padded_batch", "padded_config", "sum"])
def test_what_ranks_cost_follows_from_the_emulated_engine_s_kernel(kernel: str) -> None:
    profile = profile_of(config(kernel))
    assert profile is not None

    def capacity(rank: int, highest: int, setting: int = 128) -> float:
        spec = ReplicaSpec(
            replica_id=ReplicaId("r"), max_lora_rank=setting, pool_adapters=1, pool_bytes=1, profile="p"
        )
        return tokens_per_s({"p": profile}, spec, rank, highest)

    assert (capacity(8, 128) < capacity(8, 8)) == (kernel == "padded_batch")
    assert (capacity(8, 8) < capacity(8, 8, setting=8)) == (kernel == "padded_config")
    assert (capacity(128, 128) < capacity(8, 128)) == (kernel == "sum")


def test_an_engine_twice_as_fast_sustains_twice_as_much_and_one_without_costs_the_same_of_all_ranks() -> None:
    one, two = (profile_of(config(speed=speed, base_step_ms=400.0)) for speed in (1.0, 2.0))
    assert one is not None
    assert two is not None
    assert two.operating_point(64) >= 2 * one.operating_point(64)
    free = profile_of(config(base_step_ms=0.0, prefill_token_ms=0.0, decode_seq_ms=0.0, rank_seq_ms=0.0))
    assert free is not None
    assert free.operating_point(8) == free.operating_point(512)


def test_a_named_profile_is_kept_for_controllers_that_come_back(tmp_path: Path) -> None:
    name = next(one for one in shipped_profiles() if find_profile(one).operating_points)
    profile = profile_of(config(profile=name, kind="vllm"))
    assert profile == find_profile(name)
    keep_profile(tmp_path, profile)
    assert kept_profile(tmp_path) == profile
    keep_profile(tmp_path, profile_of(config(kind="vllm")))
    assert kept_profile(tmp_path) is None


def test_a_computed_profile_is_read_back_as_it_is(tmp_path: Path) -> None:
    profile = profile_of(config())
    keep_profile(tmp_path, profile)
    assert kept_profile(tmp_path) == profile


def test_a_profile_that_is_none_is_refused_by_its_key() -> None:
    with pytest.raises(BadInputError, match=r"^placement\.profile: no-such: no such profile"):
        profile_of(config(profile="no-such"))
