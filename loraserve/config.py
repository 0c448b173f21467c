"""The one TOML configuration: frozen sections, every value with a default, units in the names.

A wrong key or value is refused with its path and what would be right. Flags override the file
through `with_overrides`.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loraserve.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


class ClusterSection(Section, frozen=True):
    """`name` tells clusters of one machine apart; `state_dir` '' is the cache folder's."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")] = "default"
    replicas: Annotated[int, Meta(ge=1, le=1024)] = 2
    state_dir: str = ""
    start_timeout_s: Seconds = 300.0


class ModelSection(Section, frozen=True):
    """The base model: a local folder or a Hugging Face id; '' is allowed for the emulated engine."""

    path: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class EngineSection(Section, frozen=True):
    """One engine instance. `adapter_slots` is how many adapters it holds at once; `extra` is passed
    to vLLM's engine arguments as it is, except for what LoRAServe owns or cannot run."""

    kind: Literal["vllm", "emulated"] = "vllm"
    max_lora_rank: LoraRank = 128
    adapter_slots: Annotated[int, Meta(ge=1, le=4096)] = 8
    pool_bytes: Positive = 4 * 1024**3
    max_num_seqs: Positive = 64
    max_model_len_tokens: Positive = 2048
    max_num_batched_tokens: Positive = 2048
    kv_cache_bytes: Positive = 256 * 1024**2
    tensor_parallel_size: Positive = 1
    gpus_per_replica: Count = 0
    extra: dict[str, Any] = {}


class EmulatedSection(Section, frozen=True):
    """The emulated engine's latency model: step = base + per_token·prefill tokens + per_seq·running
    + per_rank·running·(largest rank in the batch); `speed` divides every step.
    `kv_bytes_per_token` sizes the KV cache in tokens."""

    base_step_ms: Annotated[float, Meta(ge=0)] = 4.0
    prefill_token_ms: Annotated[float, Meta(ge=0)] = 0.02
    decode_seq_ms: Annotated[float, Meta(ge=0)] = 0.1
    rank_seq_ms: Annotated[float, Meta(ge=0)] = 0.002
    load_bytes_per_s: Annotated[float, Meta(gt=0)] = 1e9
    kv_bytes_per_token: Positive = 4096
    speed: Annotated[float, Meta(gt=0)] = 1.0


class PlacementSection(Section, frozen=True):
    """The placement policy by name, its seed, and how often it plans anew."""

    policy: str = "least-loaded"
    seed: int = 0
    epoch_s: Seconds = 60.0


class RouterSection(Section, frozen=True):
    """`max_in_flight` and `max_waiting_per_replica` bound what a router admits."""

    host: str = "127.0.0.1"
    port: Port = 50051
    routers: Annotated[int, Meta(ge=1, le=64)] = 1
    max_in_flight: Positive = 1024
    max_waiting_per_replica: Positive = 256
    default_deadline_s: Seconds = 600.0
    max_message_bytes: Positive = 16 * 1024**2
    routing: str = "least-outstanding"


class AdaptersSection(Section, frozen=True):
    """`allow_urls` lists the URL prefixes that adapters may be fetched from besides local paths."""

    allow_urls: list[str] = []
    max_size_bytes: Positive = 8 * 1024**3
    fetch_timeout_s: Seconds = 600.0


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
    replica: ReplicaSection = ReplicaSection()
    slo: SloSection = SloSection()


def load_config(path: Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read a TOML file (None: all defaults) and lay `{"section.key": value}` overrides over it."""
    tree: dict[str, Any] = {}
    where = "the configuration"
    if path is not None:
        where = str(path)
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        table = tree.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {section}: expected a table, got {type(table).__name__}")
        table[key] = value
    return parse_config(tree, where)


def parse_config(tree: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Validate a tree of plain values; ConfigError names the path and what would be right."""
    _refuse_unknown_keys(tree, Config, where, "")
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ConfigError(f"{where}: {path.rstrip('`') or 'top level'}: {_lower(message)}") from error


def config_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain values, the inverse of `parse_config`."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    return tree


def _refuse_unknown_keys(tree: Mapping[str, Any], section: type[Section], where: str, prefix: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if key not in fields:
            raise ConfigError(f"{where}: {path}: unknown key; allowed: {', '.join(sorted(fields))}")
        kind = fields[key]
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, Mapping):
            _refuse_unknown_keys(value, kind, where, f"{path}.")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
