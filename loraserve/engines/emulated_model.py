"""The emulated engine's configuration as the values of the replica model."""

from typing import Any

from loraserve.config import EmulatedSection, EngineSection
from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import ConfigError
from placement.latency import LatencyModel, RankKernel, StepCost

BLOCK_TOKENS = 16
"""As vLLM's default."""


def limits_of(engine: EngineSection, emulated: EmulatedSection) -> ReplicaLimits:
    """What the engine holds; ConfigError if that is less than one request."""
    kv_blocks = engine.kv_cache_bytes // (emulated.kv_bytes_per_token * BLOCK_TOKENS)
    needed_blocks = -(-engine.max_model_len_tokens // BLOCK_TOKENS)
    if kv_blocks < needed_blocks:
        raise ConfigError(
            f"engine.kv_cache_bytes: holds {kv_blocks * BLOCK_TOKENS} tokens, less than one request of "
            f"engine.max_model_len_tokens = {engine.max_model_len_tokens}; give at least "
            f"{needed_blocks * BLOCK_TOKENS * emulated.kv_bytes_per_token} bytes"
        )
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise ConfigError(
            f"engine.max_num_batched_tokens: {engine.max_num_batched_tokens}; expected at least "
            f"engine.max_num_seqs = {engine.max_num_seqs}"
        )
    return ReplicaLimits(
        kv_blocks=kv_blocks,
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        adapter_slots=engine.adapter_slots,
    )


def latency_of(engine: EngineSection, emulated: EmulatedSection) -> LatencyModel:
    """The latency model, before `speed`; ConfigError for a cost beyond reason."""
    return _checked(
        kernel=RankKernel(emulated.kernel),
        max_lora_rank=engine.max_lora_rank,
        base_ms=emulated.base_step_ms,
        row_ms=emulated.decode_seq_ms,
        prefill_token_ms=emulated.prefill_token_ms,
        prefill_pair_ms=emulated.prefill_pair_ms,
        context_token_ms=emulated.context_token_ms,
        lora_step_ms=emulated.lora_step_ms,
        adapter_ms=emulated.adapter_ms,
        decode_rank_ms=emulated.rank_seq_ms,
        prefill_rank_ms=emulated.rank_token_ms,
    )


def _checked(**values: Any) -> LatencyModel:
    try:
        return LatencyModel(**values)
    except ValueError as error:
        raise ConfigError(f"emulated: {error}") from error


def step_cost_of(engine: EngineSection, emulated: EmulatedSection) -> StepCost:
    """The same in whole picoseconds, `speed` included."""
    return StepCost.of(latency_of(engine, emulated), emulated.speed)
