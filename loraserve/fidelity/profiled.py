"""The latency model of a vLLM replica: from a profile, or timed on the spot before the cluster starts."""

from pathlib import Path

from loraserve.config import Config
from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import BadInputError
from loraserve.fidelity.options import FidelityOptions
from loraserve.fidelity.setup import Progress, limits_of_facts
from loraserve.profiling import run as profiling
from loraserve.profiling.files import find_simulatable
from loraserve.profiling.made import engine_facts
from loraserve.profiling.subject import Subject, kv_bytes_per_token, prepare
from placement.latency import LatencyModel
from placement.profile import Slo

STEPS_ONLY = profiling.Effort(
    repetitions=4, batches_s=45.0, decode_steps=12, step_limit_s=2.0, probe_s=1.0, limit_s=2.0, max_probes=1
)
"""Batches are timed, loads only touched: nobody asks for operating points here."""


def model_from_profile(given: str, config: Config) -> tuple[LatencyModel, ReplicaLimits, str]:
    """A profile's latency model, with the limits of this configuration; BadInputError for a profile
    without one or of another engine."""
    profile = find_simulatable(given)
    assert profile.latency is not None, "find_simulatable gives none without"
    if profile.engine.kind != config.engine.kind:
        raise BadInputError(
            f"--profile {given}: of a {profile.engine.kind} engine; expected one of {config.engine.kind}"
        )
    return profile.latency, vllm_limits(config), f"profile {profile.name} ({profile.latency_basis})"


def vllm_limits(config: Config) -> ReplicaLimits:
    """What the configured engine holds."""
    size = kv_bytes_per_token(Path(config.model.path), config.model)
    subject = Subject(description="", model=config.model.path, adapters=(), kv_bytes_per_token=size)
    return limits_of_facts(engine_facts(config, subject))


async def measured_model(
    config: Config, options: FidelityOptions, folder: Path, progress: Progress
) -> tuple[LatencyModel, ReplicaLimits, str]:
    """Time the batches of one replica of this configuration, and fit the model to them.

    Adapters for it are made in `folder`.
    """
    subject = prepare(config, options.ranks, (), folder, seed=options.seed)
    lengths = options.lengths
    profile = profiling.ProfileOptions(
        slo=Slo(ttft_ms=config.slo.ttft_ms, tbt_ms=config.slo.tbt_ms),
        prompt_tokens=sum(lengths.prompt) // 2,
        output_tokens=sum(lengths.output) // 2,
        effort=STEPS_ONLY,
        quick=True,
        seed=options.seed,
    )
    progress(f"timing the steps of one replica for about {STEPS_ONLY.batches_s:g} s")
    measured = await profiling.run_profile(config, subject, profile, profiling.Progress())
    best = measured.recommendation.best
    source = (
        f"fitted to {best.fit.steps} steps timed before the start; {measured.recommendation.how_sure}; "
        f"median error {best.fit.median_relative_error:.1%}"
    )
    return best.model, limits_of_facts(engine_facts(config, subject)), source
