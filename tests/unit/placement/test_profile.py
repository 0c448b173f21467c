"""What a profile promises as a value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.latency import LatencyModel
from placement.profile import EngineFacts, LoadSpeeds, OperatingPoint, Profile, Slo

ENGINE = EngineFacts(kind="s-lora", model="Llama-2-7B", kv_blocks=100)
RANKS = st.lists(st.integers(1, 512), min_size=1, max_size=6, unique=True).map(sorted)


def with_points(points: dict[int, float]) -> Profile:
    listed = tuple(OperatingPoint(rank=rank, tokens_per_s=value) for rank, value in points.items())
    return Profile(name="p", source="a test", engine=ENGINE, operating_points=listed)


@given(ranks=RANKS, base_s=st.floats(1e-4, 1e-2), per_rank_s=st.floats(0, 1e-4), asked=st.integers(1, 1024))
def test_an_operating_point_is_exact_where_the_cost_per_token_is_linear_in_rank(
    ranks: list[int], base_s: float, per_rank_s: float, asked: int
) -> None:
    profile = with_points({rank: 1 / (base_s + per_rank_s * rank) for rank in ranks})
    nearest = max(asked, ranks[0]) if len(ranks) > 1 else ranks[0]
    assert profile.operating_point(asked) == pytest.approx(1 / (base_s + per_rank_s * nearest))


@given(values=st.lists(st.floats(1, 1e5), min_size=2, max_size=5), asked=st.integers(0, 1024))
def test_an_operating_point_is_never_better_than_the_best_measured(values: list[float], asked: int) -> None:
    profile = with_points({8 * 2**at: value for at, value in enumerate(values)})
    assert 0 < profile.operating_point(asked) <= max(values) * (1 + 1e-9)
    for at, value in enumerate(values):
        assert profile.operating_point(8 * 2**at) == pytest.approx(value)


def test_a_profile_without_operating_points_says_so() -> None:
    with pytest.raises(ValueError, match="p has no operating points"):
        with_points({}).operating_point(8)


def test_a_profile_refuses_what_contradicts_itself() -> None:
    point = OperatingPoint(rank=8, tokens_per_s=1.0)
    with pytest.raises(ValueError, match="each once"):
        Profile(name="p", source="", engine=ENGINE, operating_points=(point, point))
    with pytest.raises(ValueError, match="latency_basis"):
        Profile(name="p", source="", engine=ENGINE, latency=LatencyModel())
    with pytest.raises(ValueError, match="max_lora_rank: 64; expected the engine's, 128"):
        Profile(
            name="p", source="", engine=ENGINE, latency=LatencyModel(max_lora_rank=64), latency_basis="fitted"
        )
    with pytest.raises(ValueError, match="name"):
        Profile(name="a/b", source="", engine=ENGINE)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, -1.0, 1e30])
def test_figures_that_cannot_be_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_s"):
        OperatingPoint(rank=8, tokens_per_s=wrong)
    with pytest.raises(ValueError, match="tbt_ms"):
        Slo(ttft_ms=1.0, tbt_ms=wrong)
    with pytest.raises(ValueError, match="peer_bytes_per_s"):
        LoadSpeeds(peer_bytes_per_s=wrong)


def test_an_adapter_grows_with_its_rank() -> None:
    profile = Profile(name="p", source="", engine=ENGINE, adapter_bytes_per_rank=2.0 * 2**20)
    assert [profile.adapter_bytes(rank) for rank in (8, 128)] == [16 * 2**20, 256 * 2**20]
    assert profile.engine.kv_tokens == 1600
