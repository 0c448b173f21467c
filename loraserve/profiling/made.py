"""The profile that a measurement makes."""

import re
from collections.abc import Mapping

from loraserve.config import Config
from loraserve.profiling.run import Measured, ProfileOptions
from loraserve.profiling.subject import Subject
from placement.profile import EngineFacts, OperatingPoint, Profile

_CPU_BLOCK_TOKENS, _BLOCK_TOKENS = 128, 16
_KERNELS = {
    "rank-true": "LoRAServe's, each row at its own rank",
    "padded": "LoRAServe's, each row padded to max_lora_rank",
    "stock": "vLLM's own",
}


def default_name(config: Config, subject: Subject) -> str:
    """A name for the profile, from what is measured."""
    engine = config.engine
    parts = (engine.kind, engine.lora_execution if engine.kind == "vllm" else "", subject.description)
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(filter(None, parts)).lower()).strip("-")


def engine_facts(config: Config, subject: Subject) -> EngineFacts:
    """The engine's limits; the block size is vLLM's default where the configuration gives none."""
    engine = config.engine
    on_cpu = engine.kind == "vllm" and engine.gpus_per_replica == 0
    block_tokens = int(engine.extra.get("block_size", _CPU_BLOCK_TOKENS if on_cpu else _BLOCK_TOKENS))
    kv_tokens = engine.kv_cache_bytes // subject.kv_bytes_per_token
    return EngineFacts(
        kind=engine.kind,
        model=subject.description,
        kernel=_KERNELS[engine.lora_execution] if engine.kind == "vllm" else "emulated",
        lora_execution=engine.lora_execution if engine.kind == "vllm" else "",
        max_lora_rank=engine.max_lora_rank,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_blocks=max(1, kv_tokens // block_tokens),
        block_tokens=block_tokens,
        adapter_slots=engine.adapter_slots,
    )


def make_profile(
    name: str,
    config: Config,
    subject: Subject,
    options: ProfileOptions,
    measured: Measured,
    conditions: Mapping[str, object],
) -> Profile:
    """The profile of this measurement; `conditions` say on what and with which command it was made."""
    points = [
        OperatingPoint(rank=rank, tokens_per_s=probe.tokens_per_s)
        for rank, probe in measured.highest
        if rank is not None and probe is not None
    ]
    mixed = [probe for rank, probe in measured.highest if rank is None and probe is not None]
    told = "; ".join(f"{key}: {value}" for key, value in conditions.items())
    return Profile(
        name=name,
        source=f"Measured by loraserve profile. {told}. Kernel: {measured.recommendation.how_sure}",
        engine=engine_facts(config, subject),
        latency=measured.recommendation.best.model,
        latency_basis="fitted",
        operating_points=tuple(points),
        mixed_tokens_per_s=mixed[0].tokens_per_s if mixed else None,
        slo=options.slo,
        adapter_bytes_per_rank=_bytes_per_rank(subject),
        speeds=measured.speeds,
        fits=tuple(one.fit for one in measured.recommendation.fits),
        probes=measured.probes,
        origins={
            "latency": f"fitted to {len(measured.steps)} timed steps",
            "operating_points": (
                f"open loop, prompts of {options.prompt_tokens} and outputs of {options.output_tokens} "
                "tokens on average"
            ),
            "speeds.host_to_gpu_bytes_per_s": "from this machine's disk into the engine, one after the other",
            "speeds.peer_bytes_per_s": "not measured: a stand-in",
            "speeds.origin_bytes_per_s": "not measured: a stand-in",
        },
    )


def _bytes_per_rank(subject: Subject) -> float:
    return sum(one.size_bytes for one in subject.adapters) / sum(one.rank for one in subject.adapters)
