"""`loraserve profile` on the emulated engine, whose latency model is known."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.config import parse_config
from loraserve.errors import BadInputError
from loraserve.profiling.files import read_profile
from loraserve.profiling.load import LoadShape, percentile
from loraserve.profiling.run import QUICK, Measured, ProfileOptions, Progress, run_profile
from loraserve.profiling.subject import prepare
from loraserve.profiling.timing import Arrival, shared_gaps, shared_step
from placement.latency import RankKernel
from placement.profile import Slo
from tests.support.cli import run_cli

# So slow that few tokens are drawn in the seconds of a probe.
EMULATED = {"base_step_ms": 60.0, "prefill_token_ms": 0.3, "decode_seq_ms": 2.0, "rank_seq_ms": 0.04}
OPTIONS = ProfileOptions(
    slo=Slo(ttft_ms=2000.0, tbt_ms=1000.0), prompt_tokens=64, output_tokens=16, effort=QUICK, quick=True
)


async def measured(tmp_path: Path, options: ProfileOptions = OPTIONS) -> Measured:
    config = parse_config({"engine": {"kind": "emulated"}, "emulated": EMULATED})
    subject = prepare(config, (8, 64), (), tmp_path, seed=0)
    progress = Progress()
    shares: list[float] = []
    progress.listeners.append(lambda now: shares.append(now.share))
    found = await run_profile(config, subject, options, progress)
    assert shares == sorted(shares)
    return found


async def test_the_fit_gives_the_emulated_engine_s_own_model_back(tmp_path: Path) -> None:
    found = await measured(tmp_path)
    model = found.recommendation.best.model
    assert model.kernel is RankKernel.PADDED_BATCH
    assert model.base_ms == pytest.approx(60.0, rel=0.03)
    assert model.row_ms == pytest.approx(2.0, rel=0.03)
    assert model.prefill_token_ms == pytest.approx(0.3, rel=0.03)
    assert model.decode_rank_ms == pytest.approx(0.04, rel=0.03)
    assert found.speeds.host_to_gpu_bytes_per_s == pytest.approx(1e9)
    # The load that the engine bears is what its own model says, to the search's tolerance and its queue.
    predicted = dict(found.predicted_tokens_per_s)
    for rank, probe in found.highest:
        assert probe is not None
        assert probe.inside
        assert probe.tokens_per_s == pytest.approx(predicted[rank or 64], rel=0.2)
        outside = [one for one in found.probes if one.rank == rank and not one.inside]
        assert outside
        assert min(one.requests_per_s for one in outside) <= probe.requests_per_s * 1.15 * (1 + 1e-9)


async def test_an_slo_that_no_load_meets_gives_no_operating_point(tmp_path: Path) -> None:
    slo = Slo(ttft_ms=500.0, tbt_ms=1.0)
    found = await measured(tmp_path, dataclasses.replace(OPTIONS, slo=slo))
    assert [probe for _, probe in found.highest] == [None, None, None]
    assert found.probes
    assert not any(probe.inside for probe in found.probes)


async def test_a_run_that_is_out_of_time_gives_what_it_has(tmp_path: Path) -> None:
    found = await measured(tmp_path, dataclasses.replace(OPTIONS, limit_s=1e-6))
    assert not found.is_complete
    assert not found.highest
    assert not found.probes
    assert found.recommendation.best.fit.steps == len(found.steps) > 0


async def test_the_command_prints_what_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "p.toml"
    config = tmp_path / "c.toml"
    costs = "\n".join(f"{key} = {value}" for key, value in EMULATED.items())
    config.write_text(f'[engine]\nkind = "emulated"\n[emulated]\n{costs}\n')
    arguments = ("--config", str(config), "--ranks", "8,64", "--quick", "--out", str(out))
    ran = await run_cli("profile", *arguments, "--name", "mine", "--slo-tbt-ms", "400", "--json")
    assert ran.exit_code == 0, ran.stderr
    told = ran.json()
    profile = read_profile(out)
    assert profile.name == told["name"] == "mine"
    assert told["recommended_kernel"] == "padded_batch"
    assert profile.slo == Slo(ttft_ms=2000.0, tbt_ms=400.0)
    assert [point.rank for point in profile.operating_points] == [8, 64]
    assert profile.operating_point(8) > profile.operating_point(64) > 0
    assert profile.mixed_tokens_per_s is not None
    assert len(profile.probes) == len(told["probes"]) >= 6
    assert f"loraserve profile --config {config}" in profile.source
    assert "writes" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--ranks", "8,x"), "error: --ranks: got '8,x'; expected numbers with commas between"),
        (("--ranks", "256"), "error: --ranks: 256 is above engine.max_lora_rank = 128"),
        (("--ranks", "8,8"), "error: --ranks: 8,8; expected ranks of at least 1, each once"),
        (("--adapter", "a=b"), "error: --adapter: the emulated engine needs none; give --ranks instead"),
        (
            ("--prompt-tokens", "2000"),
            "error: --prompt-tokens 2000 and --output-tokens 32: requests of up to",
        ),
        (("--slo-ttft-ms", "-1"), "error: --slo: ttft_ms: -1.0; expected a number above 0"),
        (("--out", "/proc/no/p.toml"), "error: --out: /proc/no/p.toml: cannot be written: "),
    ],
)
async def test_what_cannot_be_measured_is_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    ran = await run_cli("profile", "--engine", "emulated", *arguments)
    assert ran.exit_code == 2
    assert ran.stderr.startswith(line)
    assert ran.stderr.count("\n") == 1


def test_a_real_engine_needs_a_model_that_is_here(tmp_path: Path) -> None:
    config = parse_config({"model": {"path": str(tmp_path / "none")}})
    with pytest.raises(BadInputError, match="no such folder"):
        prepare(config, (8,), (), tmp_path, seed=0)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    config = parse_config({"model": {"path": str(tmp_path)}})
    with pytest.raises(BadInputError, match="no adapters can be made for it"):
        prepare(config, (8,), (), tmp_path, seed=0)


@given(step_ms=st.floats(1, 100), rows=st.integers(1, 8), starts=st.data(), steps=st.integers(2, 10))
def test_gaps_are_those_of_all_rows_with_the_tokens_drawn_before(
    step_ms: float, rows: int, starts: st.DataObject, steps: int
) -> None:
    begins = [starts.draw(st.integers(0, 3)) for _ in range(rows)]
    last = max(begins) + steps
    streams = [
        [Arrival(at_s=at * step_ms / 1e3, tokens=1, drawn=at - begin + 1) for at in range(begin, last + 1)]
        for begin in begins
    ]
    gaps = shared_gaps(streams)
    assert [ms for ms, _ in gaps] == pytest.approx([step_ms] * steps)
    first = sum(max(begins) - begin + 1 for begin in begins)
    assert [drawn for _, drawn in gaps] == [first + rows * number for number in range(steps)]


@pytest.mark.parametrize(
    ("firsts_s", "found"),
    [
        ([0.071, 0.0712], (50.0, 0.02)),
        ([0.071, 0.081], None),  # in two steps
        ([0.0, 0.0], None),  # in the first step, whose beginning nobody saw
        ([0.2, 0.2], None),  # after the last one
    ],
)
def test_only_a_step_that_all_prompts_share_is_timed(
    firsts_s: list[float], found: tuple[float, float] | None
) -> None:
    times_s = (0.0, 0.01, 0.02, 0.07, 0.08)
    beside = [Arrival(at_s=at_s, tokens=1, drawn=number + 1) for number, at_s in enumerate(times_s)]
    told = shared_step(beside, firsts_s)
    assert told == (None if found is None else pytest.approx(found))


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_the_percentile_is_a_value_that_19_of_20_do_not_exceed(values: list[float]) -> None:
    found = percentile(values)
    assert found in values
    assert sum(value <= found for value in values) >= 0.95 * len(values)
    assert sum(value < found for value in values) < 0.95 * len(values)


@given(rate=st.floats(1e-4, 1e6))
def test_a_probe_is_bounded_at_any_rate(rate: float) -> None:
    shape = LoadShape(prompt_tokens=8, output_tokens=8, probe_s=5.0, limit_s=15.0)
    assert 1 <= shape.count(rate) <= shape.max_requests
    assert (shape.count(rate) - 1) / rate <= shape.limit_s
