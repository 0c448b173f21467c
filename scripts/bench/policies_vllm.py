"""The comparison on real vLLM CPU replicas: their model, their profiles, their fleets.

Two replicas of one thread each serve a small model made here, with adapters of ranks 8 to 128. Workloads
are the same as everywhere, with shorter prompts and outputs. vllm_mixed: vLLM's own LoRA execution, one
replica set to `max_lora_rank` 128, one to 16; vllm_uniform: both to 128; vllm_rank_true: LoRAServe's
execution, where each adapter costs its own rank. Engines yield the processors to router and client, which
would have others of their own elsewhere.

A profile is made of steps that are timed on one replica, about a minute each: for vLLM's own execution at
both settings, since what a row costs there follows from the setting. Its operating points are computed from
the latency model, 80 % of the steady state with requests of this length.
"""

import asyncio
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from policies_cases import VLLM_LENGTHS, Setting

from loraserve.client import Client
from loraserve.cluster.processes import titled
from loraserve.config import Config, load_config
from loraserve.errors import WorkFailedError
from loraserve.fidelity.options import FidelityOptions
from loraserve.fidelity.profiled import timed_model
from loraserve.profiling.files import read_profile, write_profile
from loraserve.profiling.made import engine_facts
from loraserve.profiling.subject import Subject, kv_bytes_per_token
from loraserve.samples import build_adapter, build_checkpoint
from placement.latency import LatencyModel, RankKernel
from placement.profile import LoadSpeeds, OperatingPoint, Profile
from placement.steady_load import SteadyLoad, steady_tokens_per_s
from placement.types import Placement, ReplicaId

HIDDEN, LAYERS = 1024, 4
RANKS = (8, 16, 32, 64, 128)
LOW, HIGH = 16, 128
STEADY_PART = 0.8
RANK_TRUE, STOCK = "rank-true", "stock"
ARRANGE_TIMEOUT_S = 120.0
POLL_S = 0.5
ENGINE_TITLE = "VLLM::"
ENGINE_NICENESS = 10
NEVER_S = 1e9
"""No gain repays a restart that takes so long: what was arranged stays."""


def engine_of(setting: Setting, model: Path | str, rank: int = HIGH) -> dict[str, Any]:
    """The keys of a replica's configuration. All adapters have slots, as vLLM's own execution holds no
    others; steps are short, for a prompt token at rank 128 costs it milliseconds."""
    return {
        "model.path": str(model),
        "model.dtype": "bfloat16",
        "engine.kind": "vllm",
        "engine.lora_execution": setting.lora_execution,
        "engine.max_lora_rank": rank,
        "engine.adapter_slots": setting.adapters,
        "engine.max_num_seqs": 8,
        "engine.max_model_len_tokens": 512,
        "engine.max_num_batched_tokens": 128,
        "engine.kv_cache_bytes": 64 * 1024**2,
        # Both sides compute every prompt.
        "engine.extra": {"enable_prefix_caching": False},
    }


def use_one_thread() -> None:
    """For all that is started from here; what the environment says counts more."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def build_model(folder: Path) -> Path:
    """The base model, in a folder that is made."""
    return build_checkpoint(folder, seed=0, hidden_size=HIDDEN, num_layers=LAYERS)


def profile_file(setting: Setting, folder: Path, note: Callable[[str], None]) -> Path:
    """The profile of this fleet's replicas in `folder`, measured if it is not there."""
    path = folder / f"{setting.lora_execution}.toml"
    if path.exists():
        read_profile(path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="loraserve-policies-") as name:
        profile = _measured(setting, Path(name), note)
    write_profile(path, profile)
    note(
        f"{path}: {', '.join(f'{p.tokens_per_s:.0f} tokens/s at {p.rank}' for p in profile.operating_points)}"
    )
    return path


def yield_processors(run_id: str) -> None:
    """Let the engines of a run go after everything else, for as long as they live."""
    for pid in titled(run_id, ENGINE_TITLE):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            # A thread may end while it is looked at.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), ENGINE_NICENESS)


async def arrange(addresses: Sequence[str], max_lora_ranks: Sequence[int]) -> None:
    """Have each replica of a cluster without adapters restart to its `max_lora_rank`, and let plans be made
    again; WorkFailedError if they are not there in time."""
    wanted = {ReplicaId(f"replica-{place}"): rank for place, rank in enumerate(max_lora_ranks)}
    async with Client(addresses) as client:
        await client.wait_ready(30.0)
        await client.apply_plan(Placement(max_lora_ranks=wanted))
        try:
            async with asyncio.timeout(ARRANGE_TIMEOUT_S):
                while True:
                    status = await client.status()
                    if all(
                        one.max_lora_rank == wanted[ReplicaId(one.replica_id)] and one.state == "ready"
                        for one in status.replicas
                    ):
                        break
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise WorkFailedError(
                f"the replicas were not set to {wanted} in {ARRANGE_TIMEOUT_S:g} s"
            ) from None
        await client.freeze_plan(frozen=False)


def _measured(setting: Setting, folder: Path, note: Callable[[str], None]) -> Profile:
    model = build_model(folder / "model")
    execution = setting.lora_execution
    settings = (LOW, HIGH) if execution == STOCK else (HIGH,)
    models, sources = [], []
    for rank in settings:
        note(f"the steps of a {execution} replica set to rank {rank} are timed, about a minute")
        config = load_config(None, engine_of(setting, model, rank))
        ranks = tuple(one for one in (RANKS[0], RANKS[1], RANKS[-1]) if one <= rank)
        timed, source = timed_model(
            config, FidelityOptions(engine="vllm", ranks=ranks), folder / f"timed-{rank}"
        )
        models.append(timed)
        sources.append(f"rank {rank}: {source}")
    latency = models[0] if len(models) == 1 else joined(*models)
    return _profile(config, model, latency, "; ".join(sources), folder)


def joined(low: LatencyModel, high: LatencyModel) -> LatencyModel:
    """One model for both settings: what a row and a prompt token cost goes linearly through both, the rest
    is their mean; nothing is below 0."""
    between = high.max_lora_rank - low.max_lora_rank

    def line(fixed: str, per_rank: str) -> tuple[float, float]:
        first, last = (
            getattr(one, fixed) + getattr(one, per_rank) * one.max_lora_rank for one in (low, high)
        )
        slope = max(0.0, (last - first) / between)
        return max(0.0, last - slope * high.max_lora_rank), slope

    row_ms, decode_rank_ms = line("row_ms", "decode_rank_ms")
    prefill_token_ms, prefill_rank_ms = line("prefill_token_ms", "prefill_rank_ms")
    means = {
        name: (getattr(low, name) + getattr(high, name)) / 2
        for name in ("base_ms", "prefill_pair_ms", "context_token_ms", "lora_step_ms", "adapter_ms")
    }
    return dataclasses.replace(
        high,
        row_ms=row_ms,
        decode_rank_ms=decode_rank_ms,
        prefill_token_ms=prefill_token_ms,
        prefill_rank_ms=prefill_rank_ms,
        **means,
    )


def _profile(config: Config, model: Path, latency: LatencyModel, source: str, folder: Path) -> Profile:
    size = kv_bytes_per_token(model, config.model)
    subject = Subject(description="sample", model=str(model), adapters=(), kv_bytes_per_token=size)
    facts = engine_facts(config, subject)
    adapter = build_adapter(folder / "adapter", model, rank=HIGH, seed=0)
    num_bytes = sum(path.stat().st_size for path in adapter.iterdir())
    return Profile(
        name=f"vllm-cpu-{facts.lora_execution}",
        source=f"Steps timed by scripts/bench/policies --live. {source}",
        engine=facts,
        latency=latency,
        latency_basis="fitted",
        operating_points=tuple(_point(latency, facts.max_num_seqs, rank) for rank in RANKS),
        adapter_bytes_per_rank=num_bytes / HIGH,
        speeds=LoadSpeeds(host_to_gpu_bytes_per_s=1e9),
        origins=_ORIGINS,
    )


_ORIGINS: Mapping[str, str] = {
    "operating_points": "80 % of the latency model's steady state with the comparison's requests",
    "speeds": "not measured: stand-ins",
}


def _point(latency: LatencyModel, rows: int, rank: int) -> OperatingPoint:
    charged = latency
    if latency.kernel is RankKernel.PADDED_CONFIG:
        charged = dataclasses.replace(latency, max_lora_rank=rank)
    prompt, output = VLLM_LENGTHS
    load = SteadyLoad(rows=rows, prompt_tokens=prompt, output_tokens=output)
    return OperatingPoint(rank=rank, tokens_per_s=STEADY_PART * steady_tokens_per_s(charged, load, rank))
