"""Profile files: what ships, that files come back equal, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import BadInputError
from loraserve.profiling.derive import derive_latency
from loraserve.profiling.files import (
    find_profile,
    find_simulatable,
    parse_profile,
    profile_text,
    read_profile,
    shipped_profiles,
    write_profile,
)
from placement.latency import LatencyModel, RankKernel, StepCost
from placement.profile import EngineFacts, KernelFit, LoadProbe, OperatingPoint, Profile, Slo
from placement.steady_load import SteadyLoad, steady_tokens_per_s

ENGINE: dict[str, Any] = {"kind": "vllm", "model": "m", "kv_blocks": 10}
FLOATS = st.floats(1e-9, 1e12)
TEXTS = st.text(max_size=300)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    ranks = sorted(draw(st.sets(st.integers(0, 512), max_size=4)))
    kernel = draw(st.sampled_from(RankKernel))
    latency = draw(
        st.none()
        | st.builds(LatencyModel, kernel=st.just(kernel), base_ms=st.floats(0, 1e5), row_ms=st.floats(0, 1.0))
    )
    probe = st.builds(LoadProbe, tokens_per_s=st.floats(), ttft_p95_ms=st.floats(allow_nan=False))
    return Profile(
        name="p",
        # Lines of a long text are joined when it is read.
        source=" ".join(draw(TEXTS).split()) if draw(st.booleans()) else draw(TEXTS).replace("\n", ""),
        engine=EngineFacts(kind=draw(TEXTS), model="m", kv_blocks=draw(st.integers(1, 10**9))),
        latency=latency,
        latency_basis="fitted" if latency else "",
        operating_points=tuple(OperatingPoint(rank=rank, tokens_per_s=draw(FLOATS)) for rank in ranks),
        mixed_tokens_per_s=draw(st.none() | FLOATS),
        slo=draw(st.none() | st.builds(Slo, ttft_ms=FLOATS, tbt_ms=FLOATS)),
        fits=tuple(draw(st.lists(st.builds(KernelFit, kernel=st.sampled_from(RankKernel)), max_size=3))),
        probes=tuple(draw(st.lists(probe, max_size=3))),
        origins=draw(st.dictionaries(TEXTS, TEXTS, max_size=3)),
    )


@given(profile=profiles())
def test_a_profile_comes_back_from_its_file_as_it_was(
    profile: Profile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "p.toml"
    write_profile(path, profile)
    # By text, as NaN is not equal to itself.
    assert repr(read_profile(path)) == repr(profile)


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_can_be_simulated_and_says_where_it_is_from(name: str) -> None:
    profile = find_simulatable(name)
    assert profile.name == name
    assert profile.latency is not None
    assert len(profile.source) > 80
    StepCost.of(profile.latency)
    coefficients = {
        f"latency.{field.name}"
        for field in dataclasses.fields(LatencyModel)
        if field.name.endswith("_ms") and getattr(profile.latency, field.name) > 0
    }
    assert profile.latency_basis == "derived" or coefficients <= profile.origins.keys()
    assert profile.latency_basis != "derived" or "latency" in profile.origins


def test_the_named_profiles_ship() -> None:
    assert {"a100-llama2-7b-bgmv", "loraserve-4xa100-80gb", "vllm-llama-3.1-8b"} <= set(shipped_profiles())


@pytest.mark.parametrize(
    "profile",
    [one for one in map(find_profile, shipped_profiles()) if one.latency_basis == "derived"],
    ids=lambda one: one.name,
)
def test_a_derived_latency_model_is_what_the_rule_gives(profile: Profile) -> None:
    anchor = find_profile("vllm-llama2-7b" if profile.engine.kind == "vllm" else "a100-llama2-7b-bgmv")
    assert anchor.latency is not None
    assert anchor.name in profile.source
    load = SteadyLoad(rows=profile.engine.max_num_seqs, prompt_tokens=737, output_tokens=154)
    model, deviation = derive_latency(anchor.latency, profile.operating_points, load)
    assert model == profile.latency
    assert f"{deviation:.1%}" in profile.source
    for point in profile.operating_points:
        steady = steady_tokens_per_s(model, load, point.rank)
        assert steady == pytest.approx(point.tokens_per_s, rel=deviation + 1e-9)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({}, "f: missing the key `name`"),
        ({"nam": "p"}, "f: nam: unknown key; did you mean name?"),
        ({"latency": {"base": 3}}, "f: latency.base: unknown key; did you mean base_ms?"),
        ({"probes": [{"ranks": 8}]}, "f: probes[0].ranks: unknown key; did you mean rank?"),
        ({"latency": {"base_ms": "4"}}, "f: latency.base_ms: expected `float`, got `str`"),
        ({"latency": {"base_ms": -4.0}}, "f: latency: base_ms: -4.0; expected milliseconds from 0 to 100000"),
        (
            {"latency": {"kernel": "max"}},
            "f: latency.kernel: invalid enum value 'max'; expected one of padded_",
        ),
        ({"engine": 3}, "f: engine: expected a table, got `int`"),
        ({"engine": {**ENGINE, "kv_blocks": 0}}, "f: engine: kv_blocks: 0; expected a number of at least 1"),
        (
            {"operating_points": [{"rank": 8, "tokens_per_s": float("nan")}]},
            "f: operating_points[0]: tokens_",
        ),
        ({"latency_basis": "derived"}, "f: latency_basis: expected with a latency model, and only then"),
        (
            {"latency_basis": "guessed"},
            "f: latency_basis: invalid enum value 'guessed'; expected one of fitted",
        ),
    ],
)
def test_a_wrong_profile_gets_one_line_that_names_the_key(tree: dict[str, Any], line: str) -> None:
    whole = {"name": "p", "source": "", "engine": ENGINE} if tree and "nam" not in tree else {}
    with pytest.raises(BadInputError) as raised:
        parse_profile({**whole, **tree}, "f")
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    for name, data in {
        "bytes.toml": b"\xff\xfe",
        "deep.toml": b"a=" + b"[" * 100_000,
        "json.toml": b'{"name": "p"}',
        "huge.toml": b"#" * (16 * 1024**2 + 1),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInputError, match=name):
            find_profile(str(tmp_path / name))
    with pytest.raises(BadInputError, match="cannot read the profile: No such file"):
        find_profile(str(tmp_path / "none.toml"))
    with pytest.raises(BadInputError, match=r"did you mean a100-llama2-7b-bgmv\?"):
        find_profile("a100-llama2-7b-bgmw")


def test_a_profile_without_latency_model_is_refused_with_those_that_have_one(tmp_path: Path) -> None:
    path = tmp_path / "points.toml"
    write_profile(path, Profile(name="points", source="", engine=EngineFacts(**ENGINE)))
    with pytest.raises(BadInputError, match=r"no latency model; those that have one: a100-llama2-7b-bgmv, "):
        find_simulatable(str(path))


def test_the_text_of_a_profile_is_short_lines(tmp_path: Path) -> None:
    text = profile_text(find_profile("loraserve-nd96asr-tp4"))
    assert max(map(len, text.splitlines())) < 130
    assert "host_to_gpu_bytes_per_s = 1.07e+10" in text
