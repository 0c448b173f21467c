"""Profiling the real engine, with a model that is as small as can be."""

from pathlib import Path

import pytest

from loraserve.config import parse_config
from loraserve.profiling.made import make_profile
from loraserve.profiling.run import Effort, ProfileOptions, Progress, run_profile
from loraserve.profiling.subject import prepare
from loraserve.samples import build_checkpoint
from placement.profile import Slo

pytestmark = pytest.mark.slow

KV_CACHE_BYTES = 32 * 1024**2
EFFORT = Effort(repetitions=1, batches_s=1.0, decode_steps=4, probe_s=0.5, limit_s=1.0, max_probes=1, tries=1)


async def test_the_real_engine_is_timed_fitted_and_loaded(tmp_path: Path) -> None:
    model = build_checkpoint(tmp_path / "model", seed=0, hidden_size=128, num_layers=1)
    engine = {
        "max_num_seqs": 8,
        "max_model_len_tokens": 96,
        "max_num_batched_tokens": 96,
        "max_lora_rank": 16,
        "adapter_slots": 2,
        "kv_cache_bytes": KV_CACHE_BYTES,
    }
    config = parse_config({"model": {"path": str(model)}, "engine": engine})
    subject = prepare(config, (8, 16), (), tmp_path, seed=0)
    # So lax that no machine is too slow for it.
    options = ProfileOptions(
        slo=Slo(ttft_ms=60_000.0, tbt_ms=60_000.0),
        prompt_tokens=8,
        output_tokens=4,
        effort=EFFORT,
        quick=True,
    )
    measured = await run_profile(config, subject, options, Progress())
    profile = make_profile("small", config, subject, options, measured, {})
    assert {step.adapters for step in measured.steps} == {0, 1, 2}
    assert any(step.prompts for step in measured.steps)
    assert all(step.ms > 0 for step in measured.steps)
    assert profile.latency is not None
    assert profile.latency.base_ms + profile.latency.row_ms > 0
    # Keys and values of one layer with one head of 64 in float32, in blocks of 128 tokens.
    assert profile.engine.kv_tokens == KV_CACHE_BYTES // (2 * 64 * 4) // 128 * 128
    assert {probe.rank for probe in profile.probes} == {8, 16, None}
    assert all(probe.tokens_per_s > 0 for probe in profile.probes)
