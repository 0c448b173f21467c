"""The configuration of the cluster that a live run is made on, as TOML with {cluster} for its name."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import policies_cases as cases
import policies_vllm as vllm
from policies_cases import Case

from loraserve.profiling.files import find_simulatable, write_profile
from placement.profile import Profile

KV_BYTES_PER_TOKEN = 4096
LOAD_S = 0.1
"""An adapter of the highest rank takes so long into an engine."""

_CLUSTER = """
[cluster]
name = "{{cluster}}"
replicas = {replicas}
[model]
path = "{model}"
dtype = "{dtype}"
[placement]
policy = "{policy}"
profile = "{profile}"
max_lora_ranks = "{max_lora_ranks}"
restart_s = {restart_s}
epoch_s = {epoch_s}
window_s = {window_s}
history_s = {history_s}
forecast = "{forecast}"
[router]
port = 0
routers = {routers}
routing = "{routing}"
early_refusal = false
"""

_EMULATED = """
[engine]
kind = "emulated"
max_lora_rank = {rank}
adapter_slots = {slots}
pool_bytes = {pool_bytes}
max_num_seqs = {rows}
max_num_batched_tokens = {batched}
kv_cache_bytes = {kv_bytes}
[emulated]
kernel = "{kernel}"
base_step_ms = {base}
prefill_token_ms = {prefill}
decode_seq_ms = {row}
rank_seq_ms = {rank_row}
rank_token_ms = {rank_token}
load_bytes_per_s = {load_bytes_per_s}
kv_bytes_per_token = {kv_per_token}
speed = {speed}
"""


def config_of(case: Case, model: Path, adapters: Mapping[str, Path], folder: Path) -> str:
    """The configuration of this run's cluster; files that it names are written into `folder`."""
    return (vllm_config if case.setting.is_vllm else emulated_config)(case, model, adapters, folder)


def vllm_config(case: Case, model: Path, _adapters: Mapping[str, Path], folder: Path) -> str:
    """A cluster of real replicas, all set to the highest rank; `policies_vllm.arrange` may change that."""
    keys = vllm.engine_of(case.setting, model)
    engine = [
        f"{name.removeprefix('engine.')} = {_toml(value)}"
        for name, value in keys.items()
        if name.startswith("engine.")
    ]
    cluster = _cluster_part(case, model, cases.profile_of(case.setting), folder, dtype=keys["model.dtype"])
    return "\n".join([cluster, "[engine]", *engine, ""])


def emulated_config(case: Case, model: Path, adapters: Mapping[str, Path], folder: Path) -> str:
    """A cluster of emulated replicas; the profile that its policies plan by is written into `folder`."""
    setting = case.setting
    # Policies know the replicas as the simulator's know them: this kernel, this speed.
    known: Profile = next(iter(cases.scenario(case).profiles.values()))
    engine, latency = known.engine, find_simulatable(setting.profile).latency
    assert latency is not None
    largest_bytes = max(map(_bytes_of, adapters.values()))
    # The sample adapters are small: a pool holds the same share of them as of those simulated.
    scale = largest_bytes / (engine.max_lora_rank * known.adapter_bytes_per_rank)
    pool_bytes = setting.pool_bytes * scale or largest_bytes * len(adapters)
    return _cluster_part(case, model, known, folder) + _EMULATED.format(
        rank=engine.max_lora_rank,
        slots=engine.adapter_slots,
        pool_bytes=round(pool_bytes),
        rows=engine.max_num_seqs,
        batched=engine.max_num_batched_tokens,
        kv_bytes=engine.kv_tokens * KV_BYTES_PER_TOKEN,
        kernel=setting.kernel,
        base=float(latency.base_ms),
        prefill=latency.prefill_token_ms,
        row=float(latency.row_ms),
        rank_row=latency.decode_rank_ms,
        rank_token=latency.prefill_rank_ms,
        load_bytes_per_s=largest_bytes / LOAD_S,
        kv_per_token=KV_BYTES_PER_TOKEN,
        speed=setting.speed,
    )


def _cluster_part(case: Case, model: Path, known: Profile, folder: Path, dtype: str = "auto") -> str:
    setting = case.setting
    profile = folder / f"{known.name}.toml"
    write_profile(profile, known)
    return _CLUSTER.format(
        replicas=setting.replicas,
        model=model,
        dtype=dtype,
        policy=case.contender.policy,
        profile=profile,
        max_lora_ranks="planned" if setting.is_planned or setting.is_arranged else "fixed",
        restart_s=vllm.NEVER_S if setting.is_arranged else setting.restart_s,
        epoch_s=setting.epoch_s,
        window_s=setting.window_s or setting.epoch_s,
        history_s=5 * setting.epoch_s,
        forecast=case.contender.forecast,
        routers=setting.routers,
        routing=case.contender.routing,
    )


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def _bytes_of(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.iterdir())
