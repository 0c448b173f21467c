"""The cluster that a comparison starts: its configuration, its model, its adapters and its latency model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraserve.client_types import AdapterStatus
from loraserve.config import Config, load_config
from loraserve.engines.emulated_model import latency_of, limits_of
from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.errors import BadInputError, WorkFailedError
from loraserve.fidelity.options import ADAPTERS_PER_RANK, FidelityOptions, Lengths
from loraserve.fidelity.simulated import Subject
from placement.latency import LatencyModel
from placement.policies import policy
from placement.profile import EngineFacts
from placement.types import AdapterName, AdapterVersion, NodeId, ReplicaId, ReplicaSpec, Snapshot, VersionId
from traces.columns import TraceAdapter

EMULATED: Mapping[str, object] = {
    # Steps as long as a GPU's for a model of some ten billion parameters, so that what hands the tokens
    # on has time between them.
    "emulated.kernel": "padded_batch",
    "emulated.base_step_ms": 20.0,
    "emulated.decode_seq_ms": 0.3,
    "emulated.prefill_token_ms": 0.12,
    "emulated.prefill_pair_ms": 0.0001,
    "emulated.context_token_ms": 0.0004,
    "emulated.lora_step_ms": 1.5,
    "emulated.adapter_ms": 0.3,
    "emulated.rank_seq_ms": 0.004,
    "emulated.rank_token_ms": 0.0004,
    "engine.max_num_seqs": 16,
    "engine.max_num_batched_tokens": 512,
}
VLLM: Mapping[str, object] = {
    "model.dtype": "bfloat16",
    "engine.max_num_seqs": 8,
    "engine.max_num_batched_tokens": 512,
    # Both sides compute every prompt.
    "engine.extra": {"enable_prefix_caching": False},
}
LENGTHS = {
    "emulated": Lengths(),
    "vllm": Lengths(prompt=(16, 64), output=(8, 40)),
}
MODEL_HIDDEN, MODEL_LAYERS = 1024, 8
"""The model that is made for vLLM: large enough that a step on one core takes tens of milliseconds."""


def make_model(options: FidelityOptions, folder: Path) -> Path:
    """A model for this engine, in `folder`."""
    from loraserve.samples import build_checkpoint

    if options.engine == "emulated":
        return build_checkpoint(folder, seed=options.seed)
    return build_checkpoint(folder, seed=options.seed, hidden_size=MODEL_HIDDEN, num_layers=MODEL_LAYERS)


def make_adapters(
    options: FidelityOptions, adapters: tuple[TraceAdapter, ...], model: Path, folder: Path
) -> dict[str, Path]:
    """The folder of each adapter that the workload names; BadInputError for a model that takes none."""
    from loraserve.samples import build_adapter

    made = {}
    for number, adapter in enumerate(adapters):
        assert adapter.rank is not None, "synthesis gives every adapter a rank"
        seed = 1000 * options.seed + number
        try:
            made[adapter.name] = build_adapter(folder / adapter.name, model, rank=adapter.rank, seed=seed)
        except (KeyError, OSError, ValueError) as error:
            raise BadInputError(f"--model {model}: no adapters can be made for it: {error!r}") from error
    return made


def cluster_config(
    options: FidelityOptions,
    model: Path,
    name: str,
    state_dir: Path,
    extra: Mapping[str, object] | None = None,
) -> Config:
    """The configuration of the cluster; `extra` overrides what is chosen here."""
    chosen: dict[str, Any] = {
        "cluster.name": name,
        "cluster.replicas": options.replicas,
        "cluster.state_dir": str(state_dir),
        "model.path": str(model),
        "engine.kind": options.engine,
        "engine.max_lora_rank": _config_rank(max(options.ranks)),
        "engine.adapter_slots": ADAPTERS_PER_RANK * len(options.ranks),
        "engine.max_model_len_tokens": 1024,
        "router.port": 0,
        "placement.seed": options.seed,
    }
    chosen |= EMULATED if options.engine == "emulated" else VLLM
    chosen |= dict(extra or {})
    config = load_config(None, chosen)
    longest = options.lengths.longest
    if longest > config.engine.max_model_len_tokens:
        raise BadInputError(
            f"requests of up to {longest} tokens, but engine.max_model_len_tokens is "
            f"{config.engine.max_model_len_tokens}"
        )
    return config


def emulated_model(config: Config) -> tuple[LatencyModel, ReplicaLimits]:
    """What the emulated engine computes with, as it is configured."""
    return latency_of(config.engine, config.emulated), limits_of(config.engine, config.emulated)


def limits_of_facts(facts: EngineFacts) -> ReplicaLimits:
    """A profiled engine's limits."""
    return ReplicaLimits(
        kv_blocks=facts.kv_blocks,
        block_tokens=facts.block_tokens,
        hash_block_tokens=facts.block_tokens,
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=facts.max_num_batched_tokens,
        adapter_slots=facts.adapter_slots,
    )


def subject_of(
    config: Config,
    registered: tuple[AdapterStatus, ...],
    pool_adapters: Mapping[str, int],
    latency: LatencyModel,
    limits: ReplicaLimits,
) -> Subject:
    """The running cluster as the simulator needs it; `pool_adapters` says what each replica holds.

    WorkFailedError if the live cluster has placed its adapters otherwise than the simulated one will.
    """
    adapters = tuple(
        AdapterVersion(
            version_id=VersionId(one.version),
            name=AdapterName(one.name),
            sha256=one.sha256,
            rank=one.rank,
            size_bytes=one.size_bytes,
        )
        for one in registered
    )
    replicas = tuple(
        ReplicaSpec(
            replica_id=ReplicaId(name),
            max_lora_rank=config.engine.max_lora_rank,
            pool_adapters=held,
            pool_bytes=config.engine.pool_bytes,
            node_id=NodeId("local"),
        )
        for name, held in sorted(pool_adapters.items())
    )
    _check_placement(config, registered, adapters, replicas)
    return Subject(
        adapters=adapters,
        replicas=replicas,
        limits=limits,
        latency=latency,
        policy=config.placement.policy,
        routing=config.router.routing,
        routers=config.router.routers,
        max_waiting=config.router.max_waiting_per_replica,
        report_interval_s=config.replica.report_interval_s,
        epoch_s=config.placement.epoch_s,
        seed=config.placement.seed,
    )


def _check_placement(
    config: Config,
    registered: tuple[AdapterStatus, ...],
    adapters: tuple[AdapterVersion, ...],
    replicas: tuple[ReplicaSpec, ...],
) -> None:
    snapshot = Snapshot(adapters=adapters, replicas=replicas, seed=config.placement.seed)
    planned = policy(config.placement.policy).plan(snapshot)
    for one in registered:
        live = {holder.replica_id: holder.share for holder in one.holders}
        holders = planned.holders.get(VersionId(one.version), ())
        wanted = {str(holder.replica_id): holder.share for holder in holders}
        if live != wanted:
            raise WorkFailedError(f"adapter {one.name}: placed on {live}, but simulated on {wanted}")


def _config_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that takes this rank."""
    from placement.engine_sizes import RANK_STEPS

    for step in RANK_STEPS:
        if step >= rank:
            return step
    raise BadInputError(f"--ranks {rank}: no engine takes a rank above {RANK_STEPS[-1]}")


Progress = Callable[[str], None]
"""Told in a few words what is done now."""
