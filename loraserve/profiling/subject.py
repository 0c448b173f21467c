"""The base model and the adapters that a profile is measured with: given, or made on the spot."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraserve.adapters import inspect_adapter, read_base
from loraserve.config import Config, ModelSection
from loraserve.engines.base import AdapterFiles
from loraserve.errors import BadInputError
from placement.types import VersionId

HIDDEN_SIZE, LAYERS = 1024, 8
_EMULATED_BYTES_PER_RANK = 2 * 2**20
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is profiled: `model` as the configuration has it, '' for the emulated engine without one."""

    description: str
    model: str
    adapters: tuple[AdapterFiles, ...]
    kv_bytes_per_token: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, the lowest first."""
        return tuple(sorted({one.rank for one in self.adapters}))


def prepare(
    config: Config, ranks: Sequence[int], given: Sequence[str], folder: Path, *, seed: int
) -> Subject:
    """The subject of this configuration: adapters of these ranks made in `folder`, or those `given` as
    NAME=DIR. BadInputError says what is wrong.

    Of the lowest and of the highest rank there are two, as far as the engine holds them.
    """
    if config.engine.kind == "emulated":
        if given:
            raise BadInputError("--adapter: the emulated engine needs none; give --ranks instead")
        adapters = _named(config, ranks, _no_files)
        kv_bytes = config.emulated.kv_bytes_per_token
        return Subject(
            description=config.model.path or "emulated",
            model=config.model.path,
            adapters=adapters,
            kv_bytes_per_token=kv_bytes,
        )
    model = _model(config, folder, seed)
    if given:
        adapters = _given(model, given, config.engine.max_lora_rank)
    else:
        adapters = _built(config, model, ranks, folder, seed)
    sample = f"sample, hidden {HIDDEN_SIZE}, {LAYERS} layers"
    return Subject(
        description=Path(config.model.path).resolve().name if config.model.path else sample,
        model=str(model),
        adapters=adapters,
        kv_bytes_per_token=kv_bytes_per_token(model, config.model),
    )


def check_ranks(config: Config, ranks: Sequence[int]) -> None:
    """BadInputError for ranks that cannot be, or that the engine does not take."""
    if not ranks or min(ranks) < 1 or len(set(ranks)) != len(ranks):
        raise BadInputError(f"--ranks: {','.join(map(str, ranks))}; expected ranks of at least 1, each once")
    most = config.engine.max_lora_rank
    if max(ranks) > most:
        raise BadInputError(f"--ranks: {max(ranks)} is above engine.max_lora_rank = {most}")
    held = config.engine.max_held_adapters
    if len(ranks) > held:
        raise BadInputError(f"--ranks: {len(ranks)} ranks, but the engine holds {held} adapters; give fewer")


def kv_bytes_per_token(model: Path, section: ModelSection) -> int:
    """Of keys and values in all layers, from the model's config.json; BadInputError if it does not tell."""
    path = model / "config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        heads = told.get("num_key_value_heads") or told["num_attention_heads"]
        head_dim = told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"]
        dtype = told.get("torch_dtype") or told.get("dtype") or "bfloat16"
        size = _DTYPE_BYTES[dtype if section.dtype == "auto" else section.dtype]
        return int(2 * told["num_hidden_layers"] * heads * head_dim * size)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInputError(
            f"{path}: does not say how large a token's keys and values are: {error!r}; expected "
            "num_hidden_layers, num_attention_heads and hidden_size"
        ) from error


def _model(config: Config, folder: Path, seed: int) -> Path:
    if not config.model.path:
        from loraserve.samples import build_checkpoint

        return build_checkpoint(folder / "model", seed=seed, hidden_size=HIDDEN_SIZE, num_layers=LAYERS)
    path = Path(config.model.path)
    if not path.is_dir():
        raise BadInputError(f"model.path: {path}: no such folder; profiling needs the model on this machine")
    return path


def _built(
    config: Config, model: Path, ranks: Sequence[int], folder: Path, seed: int
) -> tuple[AdapterFiles, ...]:
    from loraserve.samples import build_adapter

    def build(name: str, rank: int, number: int) -> AdapterFiles:
        directory = build_adapter(folder / name, model, rank=rank, seed=seed + number)
        return _files(name, directory, rank)

    try:
        return _named(config, ranks, build)
    except (KeyError, OSError) as error:
        raise BadInputError(
            f"model.path: {model}: no adapters can be made for it ({error!r}); give some with --adapter"
        ) from error


def _given(model: Path, given: Sequence[str], max_lora_rank: int) -> tuple[AdapterFiles, ...]:
    base = read_base(model)
    found: dict[str, AdapterFiles] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory) or name in found:
            raise BadInputError(f"--adapter: got {text!r}; expected NAME=DIR, each name once")
        manifest = inspect_adapter(Path(directory), base=base, max_lora_rank=max_lora_rank)
        found[name] = _files(name, Path(directory), manifest.rank)
    return tuple(found.values())


def _named(
    config: Config, ranks: Sequence[int], make: Callable[[str, int, int], AdapterFiles]
) -> tuple[AdapterFiles, ...]:
    room = min(config.engine.max_held_adapters, config.engine.adapter_slots) - len(ranks)
    outer = (max(ranks), min(ranks))
    twice = [rank for rank in dict.fromkeys(outer) if outer.index(rank) < room]
    return tuple(
        make(f"r{rank}-{'ab'[number]}", rank, number)
        for rank in sorted(ranks)
        for number in range(2 if rank in twice else 1)
    )


def _no_files(name: str, rank: int, _number: int) -> AdapterFiles:
    return AdapterFiles(
        version_id=_version(name),
        directory=Path(),
        rank=rank,
        size_bytes=rank * _EMULATED_BYTES_PER_RANK,
    )


def _files(name: str, directory: Path, rank: int) -> AdapterFiles:
    size = sum(file.stat().st_size for file in directory.iterdir())
    return AdapterFiles(version_id=_version(name), directory=directory, rank=rank, size_bytes=size)


def _version(name: str) -> VersionId:
    return VersionId(f"{name}@{0:016x}")
