"""Rewrites an adapter whose modules differ in scaling, so that one r and one alpha serve all of them.

Engines read one `r` and one `lora_alpha` for all modules. Each lora_B is multiplied by its module's own
scaling in float32 and stored as F32 (one rounding, of 2^-24 at most); the new config says r = the largest
rank and scaling 1 for every module, to PEFT as to an engine that ignores the patterns.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from loraserve.adapters.files import CONFIG_FILE, SLICE_BYTES, WEIGHTS_FILE, write_file
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.peft_config import PeftConfig, parse_peft_config
from loraserve.adapters.safetensors_file import ITEM_BYTES, Header, TensorInfo, encode_header, read_header

_SUFFIX = ".lora_B.weight"
_PREFIX = "base_model.model."


def fold_adapter(source: Path, target: Path, manifest: AdapterManifest) -> None:
    """Write the folded adapter into the empty folder `target`; `source` has been inspected and stays.

    The same source always gives the same bytes.
    """
    raw = (source / CONFIG_FILE).read_bytes()
    config = parse_peft_config(raw, str(source))
    folded = json.dumps(_folded_config(json.loads(raw), manifest), indent=2, sort_keys=True) + "\n"
    write_file(target / CONFIG_FILE, iter((folded.encode(),)))
    with (source / WEIGHTS_FILE).open("rb") as file:
        header = read_header(file, (source / WEIGHTS_FILE).stat().st_size)
        write_file(target / WEIGHTS_FILE, _folded_weights(file, header, config))


def _folded_config(tree: dict[str, Any], manifest: AdapterManifest) -> dict[str, Any]:
    lower = {f"^{module}": rank for module, rank in manifest.module_ranks if rank != manifest.rank}
    return tree | {
        "r": manifest.rank,
        "lora_alpha": manifest.rank,
        "use_rslora": False,
        "rank_pattern": lower,
        "alpha_pattern": lower,
    }


def _folded_weights(file: BinaryIO, header: Header, config: PeftConfig) -> Iterator[bytes]:
    factors = {tensor.name: _factor(tensor.name, config) for tensor in header.tensors}
    yield encode_header(
        {
            tensor.name: (tensor.dtype if factors[tensor.name] is None else "F32", tensor.shape)
            for tensor in header.tensors
        },
        header.metadata,
    )
    for tensor in header.tensors:
        factor = factors[tensor.name]
        for piece in _pieces(file, header, tensor):
            yield piece if factor is None else _scaled(piece, tensor.dtype, factor)


def _factor(name: str, config: PeftConfig) -> float | None:
    """What the tensor is multiplied by; None where it stays as it is."""
    if not name.endswith(_SUFFIX):
        return None
    return config.scaling_of(name.removeprefix(_PREFIX).removesuffix(_SUFFIX))


def _pieces(file: BinaryIO, header: Header, tensor: TensorInfo) -> Iterator[bytes]:
    file.seek(header.data_start + tensor.begin)
    for start in range(tensor.begin, tensor.end, SLICE_BYTES):
        yield file.read(min(SLICE_BYTES, tensor.end - start))


def _scaled(piece: bytes, dtype: str, factor: float) -> bytes:
    assert len(piece) % ITEM_BYTES[dtype] == 0
    # What overflows becomes infinity, which the inspection of the folded files refuses.
    with np.errstate(over="ignore", under="ignore"):
        return (_as_float32(piece, dtype) * np.float32(factor)).astype("<f4").tobytes()


def _as_float32(piece: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(piece, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(piece, dtype="<f2" if dtype == "F16" else "<f4").astype(np.float32)
