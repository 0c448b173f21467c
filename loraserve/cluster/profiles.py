"""The profile that a cluster plans and routes by, from `up` to the controllers of the run.

It is read or computed once and kept in the cluster's folder, so that a controller that comes back has the
same one whatever has become of the file.
"""

from dataclasses import replace
from pathlib import Path

from loraserve.config import Config
from loraserve.engines.emulated_model import latency_of, limits_of
from loraserve.errors import BadInputError
from loraserve.profiling.files import find_profile, read_profile, write_profile
from placement.engine_sizes import RANK_STEPS
from placement.latency import COEFFICIENTS, LatencyModel, RankKernel
from placement.profile import EngineFacts, LoadSpeeds, OperatingPoint, Profile, Slo
from placement.steady_load import SteadyLoad, step_terms_ms

FILE_NAME = "profile.toml"

PROMPT_TOKENS, OUTPUT_TOKENS = 256.0, 64.0
"""The typical request that an emulated replica's operating points are computed for."""

STEADY_PART = 0.8
"""The part of its steady state that a replica is taken to sustain when requests come at random; the same for
every rank, so that it shifts no comparison."""


def profile_of(config: Config) -> Profile | None:
    """The profile that `placement.profile` names; if it names none, what follows of itself for the emulated
    engine, None for vLLM. BadInputError for one that is not there, or has no operating points."""
    given = config.placement.profile
    if not given:
        return emulated_profile(config) if config.engine.kind == "emulated" else None
    try:
        profile = find_profile(given)
    except BadInputError as error:
        raise BadInputError(str(error).replace("--profile", "placement.profile:", 1)) from None
    if not profile.operating_points:
        raise BadInputError(f"placement.profile: {given}: it has no operating points to plan by")
    return profile


def emulated_profile(config: Config) -> Profile:
    """What a replica of the emulated engine does by its configuration, `speed` included.

    Operating points are `STEADY_PART` of the steady state with typical requests, as many at a time as the
    engine, its KV cache and the TBT target allow. Under `padded_config` the point of a rank is what an engine
    with that `max_lora_rank` sustains. ConfigError for a configuration beyond reason.
    """
    engine, emulated = config.engine, config.emulated
    limits = limits_of(engine, emulated)
    paced = latency_of(engine, emulated)
    model = replace(paced, **{name: getattr(paced, name) / emulated.speed for name in COEFFICIENTS})
    slo = Slo(ttft_ms=config.slo.ttft_ms, tbt_ms=config.slo.tbt_ms)
    in_cache = int(limits.kv_blocks * limits.block_tokens / (PROMPT_TOKENS + OUTPUT_TOKENS))
    most = max(1, min(limits.max_num_seqs, in_cache))
    return Profile(
        name="emulated",
        source="Computed from the [emulated] section of the cluster's configuration.",
        engine=EngineFacts(
            kind="emulated",
            model=config.model.path,
            max_lora_rank=engine.max_lora_rank,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            kv_blocks=limits.kv_blocks,
            block_tokens=limits.block_tokens,
            adapter_slots=limits.adapter_slots,
        ),
        latency=model,
        latency_basis="derived",
        operating_points=tuple(_point(model, slo, most, rank) for rank in RANK_STEPS),
        slo=slo,
        speeds=LoadSpeeds(host_to_gpu_bytes_per_s=emulated.load_bytes_per_s),
    )


def keep_profile(folder: Path, profile: Profile | None) -> None:
    """Leave the profile in the cluster's folder, or none; WorkFailedError if it cannot be written."""
    if profile is None:
        (folder / FILE_NAME).unlink(missing_ok=True)
    else:
        write_profile(folder / FILE_NAME, profile)


def kept_profile(folder: Path) -> Profile | None:
    """The profile in the cluster's folder, if there is one; BadInputError if it is damaged."""
    path = folder / FILE_NAME
    return read_profile(path) if path.exists() else None


def _point(model: LatencyModel, slo: Slo, most: int, rank: int) -> OperatingPoint:
    if model.kernel is RankKernel.PADDED_CONFIG:
        model = replace(model, max_lora_rank=rank)
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _step_ms(model, middle, rank) <= slo.tbt_ms else (low, middle - 1)
    # Without any cost there is no steady state, and no rank costs more than another.
    step_ms = max(1e-6, _step_ms(model, low, rank))
    return OperatingPoint(rank=rank, tokens_per_s=STEADY_PART * 1e3 * _load(low).tokens_per_step / step_ms)


def _step_ms(model: LatencyModel, rows: int, rank: int) -> float:
    fixed_ms, per_rank_ms = step_terms_ms(model, _load(rows))
    return fixed_ms + per_rank_ms * rank


def _load(rows: int) -> SteadyLoad:
    return SteadyLoad(rows=rows, prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
