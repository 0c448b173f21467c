"""Inspects one adapter folder: everything is checked before anything is served."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loraserve.adapters.base import BaseModel
from loraserve.adapters.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    open_member,
    scan_weights,
)
from loraserve.adapters.peft_config import PeftConfig, parse_peft_config
from loraserve.adapters.safetensors_file import MAX_HEADER_BYTES, Header, SafetensorsError, read_header
from loraserve.adapters.tensors import check_tensors
from loraserve.errors import AdapterRejectedError

DEFAULT_MAX_BYTES = 8 * 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    """What an adapter's files say of it.

    `rank` is the largest tensor rank; `size_bytes` is the sum of the tensors' sizes; `sha256` is, in hex,
    that of adapter_config.json's sha256 followed by adapter_model.safetensors' (32 bytes each).
    `needs_folding` means that no single r and alpha scale all modules rightly: see `folding`.
    """

    rank: int
    size_bytes: int
    sha256: str
    target_modules: tuple[str, ...]
    alpha: float
    use_rslora: bool
    dtypes: tuple[str, ...]
    num_tensors: int
    num_modules: int
    module_ranks: tuple[tuple[str, int], ...]
    needs_folding: bool
    warnings: tuple[str, ...] = ()


def inspect_adapter(
    directory: Path,
    *,
    base: BaseModel | None,
    max_lora_rank: int,
    max_bytes: int = DEFAULT_MAX_BYTES,
    where: str | None = None,
) -> AdapterManifest:
    """Read and check an adapter folder; AdapterRejectedError says in one line why it cannot be served.

    `base` None skips the checks against the base model. `where` is what messages call the folder. Weights are
    read in slices: memory stays bounded whatever their size.
    """
    where = where or str(directory)
    raw = read_config(directory, where)
    config = parse_peft_config(raw, where)
    with open_member(directory, WEIGHTS_FILE, max_bytes=max_bytes + MAX_HEADER_BYTES, where=where) as opened:
        file, file_bytes = opened
        header = _header(file, file_bytes, max_bytes, where)
        ranks = check_tensors(header.tensors, config=config, base=base, where=where)
        rank = max(ranks.values())
        if rank > max_lora_rank:
            raise AdapterRejectedError(
                f"{where}: its rank is {rank}; no replica allows more than {max_lora_rank}"
            )
        weights_digest = scan_weights(file, header, where)
    return AdapterManifest(
        rank=rank,
        size_bytes=_size_bytes(header),
        sha256=content_digest(raw, weights_digest),
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in ranks})),
        alpha=config.alpha,
        use_rslora=config.use_rslora,
        dtypes=tuple(sorted({tensor.dtype for tensor in header.tensors})),
        num_tensors=len(header.tensors),
        num_modules=len(ranks),
        module_ranks=tuple(sorted(ranks.items())),
        needs_folding=_needs_folding(config, ranks),
        warnings=_warnings(config, base),
    )


def content_digest(config: bytes, weights_digest: bytes) -> str:
    """The sha256 of an adapter's content, in hex: of its config's sha256 followed by its weights' one."""
    return hashlib.sha256(hashlib.sha256(config).digest() + weights_digest).hexdigest()


def read_config(directory: Path, where: str) -> bytes:
    """The bytes of adapter_config.json."""
    with open_member(directory, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES, where=where) as (file, _):
        return file.read(MAX_CONFIG_BYTES + 1)


def _header(file: BinaryIO, file_bytes: int, max_bytes: int, where: str) -> Header:
    try:
        header = read_header(file, file_bytes)
    except SafetensorsError as error:
        raise AdapterRejectedError(f"{where}: {WEIGHTS_FILE}: {error}") from error
    if _size_bytes(header) > max_bytes:
        raise AdapterRejectedError(
            f"{where}: its tensors have {_size_bytes(header)} bytes; at most {max_bytes} are allowed"
        )
    return header


def _size_bytes(header: Header) -> int:
    return sum(tensor.end - tensor.begin for tensor in header.tensors)


def _needs_folding(config: PeftConfig, ranks: Mapping[str, int]) -> bool:
    plain = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
    return max(ranks.values()) != config.rank or any(config.scaling_of(module) != plain for module in ranks)


def _warnings(config: PeftConfig, base: BaseModel | None) -> tuple[str, ...]:
    if base is None or config.base_model is None:
        return ()
    trained, served = (name.rstrip("/").rpartition("/")[2] for name in (config.base_model, base.name))
    if trained.lower() == served.lower():
        return ()
    return (f"the adapter was trained on {config.base_model!r}, the base model here is {base.name!r}",)
