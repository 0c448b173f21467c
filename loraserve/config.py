"""The one TOML configuration: frozen sections, every value with a default, units in the names.

A wrong key or value is refused with its path and what would be right. Flags override the file
through the `overrides` of `load_config`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from loraserve.errors import ConfigError
from loraserve.pace import DEFAULT_SHARE
from loraserve.sections import Section, checked, read_toml, shown
from placement.engine_sizes import MAX_POOL_ADAPTERS
from placement.routing.pairing import routing_for

# As far as timers reach, about thirty years.
MAX_SECONDS = 1e9
# The largest size that gRPC takes.
MAX_MESSAGE_BYTES = 2**31 - 1
# Refuses infinity; more than any cost or rate is.
MAX_FINITE = 1e18
# Ray counts processors in ten-thousandths.
MIN_CPUS = 1e-4

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]
Cost = Annotated[float, Meta(ge=0, le=MAX_FINITE)]
Rate = Annotated[float, Meta(gt=0, le=MAX_FINITE)]
Port = Annotated[int, Meta(ge=0, le=65535)]
LoraExecution = Literal["rank-true", "padded", "stock", "off"]
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
# What `"auto"` leaves to the start of a replica.
ChosenAtStart = Literal["max_lora_rank", "adapter_slots"]
AUTO = "auto"


class ClusterSection(Section, frozen=True):
    """`name` tells clusters of one machine apart; `state_dir` '' is the cache folder's. `ray_address` is a
    Ray cluster to run in, HOST:PORT or auto; '' starts one for this run alone. A replica whose node has
    died waits `room_timeout_s` for another with room."""

    name: Annotated[
        str,
        Meta(
            pattern=r"\A[a-z0-9][a-z0-9-]{0,30}\Z",
            description="1 to 31 of the characters a-z, 0-9 and -, the first one no -",
        ),
    ] = "default"
    replicas: Annotated[int, Meta(ge=1, le=1024)] = 2
    state_dir: str = ""
    start_timeout_s: Seconds = 300.0
    ray_address: str = ""
    cpus_per_replica: Cost = 1.0
    room_timeout_s: Seconds = 3600.0

    def __post_init__(self) -> None:
        if 0 < self.cpus_per_replica < MIN_CPUS:
            raise ValueError(
                f"cpus_per_replica: {shown(self.cpus_per_replica)}; expected 0 or at least {MIN_CPUS:g}"
            )


class ModelSection(Section, frozen=True):
    """The base model: a local folder or a Hugging Face id; '' is allowed for the emulated engine."""

    path: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class EngineSection(Section, frozen=True):
    """One engine instance. It holds up to `pool_adapters` adapters (0: as many as `pool_bytes` holds, at most
    4096), and a batch up to `adapter_slots` different ones. `extra` is passed to vLLM's engine arguments as
    it is, except for what LoRAServe owns or cannot run. `lora_execution` says how vLLM computes adapters: at
    their own rank, padded to `max_lora_rank` by our own grouped product (to compare with), as vLLM itself
    does, which holds none beside those in slots, or not at all.

    `max_lora_rank` and `adapter_slots` may be "auto", which is kept as their names in `auto`: each start of a
    replica chooses them by `placement.engine_sizes` from what is registered, the device memory for slots
    (`slot_bytes`) and `pool_bytes`; until then they have their defaults.
    """

    kind: Literal["vllm", "emulated"] = "vllm"
    max_lora_rank: Annotated[
        LoraRank, Meta(description="auto or one of 1, 8, 16, 32, 64, 128, 256, 320, 512")
    ] = 128
    adapter_slots: Annotated[int, Meta(ge=1, le=4096, description="auto or an integer from 1 to 4096")] = 8
    slot_bytes: Positive = 1024**3
    pool_adapters: Annotated[int, Meta(ge=0, le=65536)] = 0
    pool_bytes: Positive = 4 * 1024**3
    max_num_seqs: Positive = 64
    max_model_len_tokens: Positive = 2048
    max_num_batched_tokens: Positive = 2048
    kv_cache_bytes: Positive = 256 * 1024**2
    tensor_parallel_size: Positive = 1
    gpus_per_replica: Count = 0
    lora_execution: LoraExecution = "rank-true"
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    auto: list[ChosenAtStart] = msgspec.field(default_factory=list)

    @property
    def caches_prefixes(self) -> bool:
        """Whether it computes the beginning that prompts of one adapter share only once, as vLLM does unless
        told otherwise."""
        return self.kind == "vllm" and bool(self.extra.get("enable_prefix_caching", True))

    @property
    def max_held_adapters(self) -> int:
        """How many adapters it may hold at once."""
        return self.held_with(self.lora_execution)

    def held_with(self, execution: LoraExecution) -> int:
        """How many adapters it may hold at once if this is how it really computes them."""
        if execution == "off":
            return 0
        most = self.pool_adapters or MAX_POOL_ADAPTERS
        return min(most, self.adapter_slots) if execution == "stock" else most


class EmulatedSection(Section, frozen=True):
    """The emulated engine's latency model, in the terms of `placement.latency.LatencyModel`: a step takes
    base + seq·sequences in it + prefill_token·prompt tokens + prefill_pair·(prompt token, token before it)
    + context_token·tokens in the KV cache of what decodes, and for adapters lora_step + adapter·different
    ones + rank_seq·decoding rows·rank + rank_token·prompt tokens·rank, where `kernel` says which rank: the
    engine's `max_lora_rank`, the largest in the batch, or each row's own. `speed` divides every step.
    `kv_bytes_per_token` sizes the KV cache in tokens. With `engine_process` the engine dies with a child
    process of its own, as vLLM does with its."""

    kernel: Literal["padded_config", "padded_batch", "sum"] = "padded_batch"
    base_step_ms: Cost = 4.0
    prefill_token_ms: Cost = 0.02
    prefill_pair_ms: Cost = 0.0
    decode_seq_ms: Cost = 0.1
    context_token_ms: Cost = 0.0
    lora_step_ms: Cost = 0.0
    adapter_ms: Cost = 0.0
    rank_seq_ms: Cost = 0.002
    rank_token_ms: Cost = 0.0
    load_bytes_per_s: Rate = 1e9
    kv_bytes_per_token: Positive = 4096
    speed: Rate = 1.0
    engine_process: bool = False


class PlacementSection(Section, frozen=True):
    """The placement policy by name, its seed, and how often it plans anew, for the demand that `forecast`
    expects: a forecaster of `placement.demand`, which is told the mean of the last `window_s`, whole epochs,
    at least one. `history_s` is what `loraserve` looks back on, `season_s` the period of `seasonal`.

    `profile` is what one replica can do, a shipped profile's name or a file; '' lets the emulated engine be
    planned for by its configuration, and vLLM as if every rank cost the same.

    `max_lora_ranks` "planned" lets the plan choose each replica's setting where the profile's kernel is
    padded_config, and restarts replicas to it, if that repays within `restart_horizon_epochs` the `restart_s`
    that a start takes, and their drain before. With `migration` "dlora", requests of overloaded replicas move
    with their adapters every `migration_period_s`.
    """

    policy: str = "least-loaded"
    profile: str = ""
    seed: int = 0
    epoch_s: Seconds = 60.0
    forecast: Literal["adaptive", "ema", "last", "loraserve", "quantile", "seasonal", "trend"] = "adaptive"
    window_s: Seconds = 60.0
    history_s: Seconds = 300.0
    season_s: Seconds = 86_400.0
    max_lora_ranks: Literal["fixed", "planned"] = "fixed"
    restart_s: Seconds = 60.0
    restart_horizon_epochs: Positive = 20
    migration: Literal["off", "dlora"] = "off"
    migration_period_s: Seconds = 10.0


class RouterSection(Section, frozen=True):
    """`max_in_flight` and `max_waiting_per_replica` bound what a router admits; `holder_wait_s` is how
    long a request waits for a replica when its last one has died, `lease_s` how long a replica picked
    by a client is kept for it. `routing` "auto", or left out, is what goes with the placement policy."""

    host: str = "127.0.0.1"
    port: Port = 50051
    routers: Annotated[int, Meta(ge=1, le=64)] = 1
    max_in_flight: Positive = 1024
    max_waiting_per_replica: Positive = 256
    default_deadline_s: Seconds = 600.0
    max_message_bytes: Annotated[int, Meta(ge=1, le=MAX_MESSAGE_BYTES)] = 16 * 1024**2
    routing: str = "least-outstanding"
    holder_wait_s: Seconds = 30.0
    lease_s: Seconds = 5.0
    early_refusal: bool = True


class AdaptersSection(Section, frozen=True):
    """`allow_urls` lists the URL prefixes that adapters may be fetched from besides local paths."""

    allow_urls: list[str] = msgspec.field(default_factory=list)
    max_size_bytes: Positive = 8 * 1024**3
    fetch_timeout_s: Seconds = 600.0


class FabricSection(Section, frozen=True):
    """How adapters get from replica to replica: the transports in the order in which they are tried, none for
    the controller's store alone. At most `max_fetches` come to a replica at a time, with `inflight_bytes` in
    all, and one whose peer sends nothing for `idle_timeout_s` goes on elsewhere. `racks` lists the host names
    of each rack, whose machines are near each other. While requests run, fetches take `busy_share` of one
    processor, where the engine computes on the same ones; 1: all they can."""

    transports: list[Literal["ucx", "tcp"]] = msgspec.field(default_factory=lambda: ["ucx", "tcp"])
    max_fetches: Annotated[int, Meta(ge=1, le=64)] = 4
    inflight_bytes: Positive = 256 * 1024**2
    idle_timeout_s: Seconds = 5.0
    busy_share: Annotated[float, Meta(gt=0.0, le=1.0)] = DEFAULT_SHARE
    racks: list[list[str]] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        if len(set(self.transports)) < len(self.transports):
            raise ValueError(f"transports: {shown(self.transports)}; expected each of them once")
        hosts = [host for rack in self.racks for host in rack]
        if not all(hosts) or len(set(hosts)) < len(hosts):
            raise ValueError(f"racks: {shown(self.racks)}; expected names of hosts, each of them in one rack")


class ReplicaSection(Section, frozen=True):
    """How a replica behaves while draining and reporting."""

    drain_timeout_s: Seconds = 30.0
    report_interval_s: Seconds = 0.1
    check_interval_s: Seconds = 1.0
    max_restarts: Count = 3
    max_in_flight: Positive = 1024


class SloSection(Section, frozen=True):
    """The targets that attainment and goodput are counted against."""

    ttft_ms: Seconds = 2000.0
    tbt_ms: Seconds = 150.0


class Config(Section, frozen=True):
    """The whole configuration."""

    cluster: ClusterSection = ClusterSection()
    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    emulated: EmulatedSection = EmulatedSection()
    placement: PlacementSection = PlacementSection()
    router: RouterSection = RouterSection()
    adapters: AdaptersSection = AdaptersSection()
    fabric: FabricSection = FabricSection()
    replica: ReplicaSection = ReplicaSection()
    slo: SloSection = SloSection()


def load_config(path: Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read a TOML file (None: all defaults) and lay `{"section.key": value}` overrides over it."""
    tree: dict[str, Any] = {}
    where = "the configuration"
    if path is not None:
        where = str(path)
        tree = read_toml(path, "the configuration")
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        table = tree.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {section}: {shown(table)}; expected a table")
        table[key] = value
    return parse_config(tree, where)


def parse_config(tree: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Validate a tree of plain values; ConfigError names the path and what would be right."""
    return checked(_with_routing(_with_auto(tree)), Config, where)


def config_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain values, the inverse of `parse_config`."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    return tree


def _with_auto(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move what is "auto" from its own key to the list of what is."""
    engine = tree.get("engine")
    if not isinstance(engine, Mapping):
        return tree
    chosen = [key for key in get_args(ChosenAtStart) if engine.get(key) == AUTO]
    if not chosen:
        return tree
    rest = {key: value for key, value in engine.items() if key not in chosen}
    return {**tree, "engine": {**rest, "auto": chosen}}


def _with_routing(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name the routing policy that goes with the placement policy, where none is named."""
    router, placement = tree.get("router", {}), tree.get("placement", {})
    if not isinstance(router, Mapping) or not isinstance(placement, Mapping):
        return tree
    policy = placement.get("policy", PlacementSection().policy)
    if router.get("routing", AUTO) != AUTO or not isinstance(policy, str):
        return tree
    return {**tree, "router": {**router, "routing": routing_for(policy)}}
