"""The adapters that `bench fetch` moves: made to order, of a size or of a rank of a model."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from loraserve.adapters import AdapterStore, BaseModel, StoreLimits
from loraserve.adapters.segment_head import SegmentHead
from loraserve.errors import BadInputError, WorkFailedError
from placement.types import VersionId, version_id

MAX_RANK = 512
MIB = 1024**2
_UNITS: Mapping[str, int] = {"KiB": 1024, "MiB": MIB, "GiB": 1024**3}
_SIZE = re.compile(r"(\d{1,6})(KiB|MiB|GiB)", re.ASCII)
_MAX_BYTES = 8 * 1024**3
_LAYERS = 32
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ITEM_BYTES = 2
_PIECE_BYTES = 4 * MIB
_LOW_RANK, _HIGH_RANK, _HIGH_FROM_BYTES = 8, 64, 16 * MIB
_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(?:.+\.)?(?P<leaf>[^.]+)$", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An adapter to be made: modules with their (output, input) sizes, all of one rank, in bfloat16."""

    label: str
    rank: int
    modules: Mapping[str, tuple[int, int]]

    @property
    def body_bytes(self) -> int:
        """What its matrices take."""
        return sum(self.rank * (rows + columns) * _ITEM_BYTES for rows, columns in self.modules.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSubject:
    """An adapter on disk: as a plain folder, and as an entry of a controller's store."""

    shape: Shape
    version: VersionId
    folder: Path
    stored: Path
    digest: str
    head_sha256: str
    body_bytes: int


def parse_size(text: str) -> int:
    """Bytes of a size such as 16MiB; BadInputError."""
    match = _SIZE.fullmatch(text.strip())
    size_bytes = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < size_bytes <= _MAX_BYTES:
        raise BadInputError(
            f"--sizes: got {text.strip()!r}; expected such as 512KiB, 16MiB or 2GiB, at most 8GiB"
        )
    return size_bytes


def show_size(size_bytes: int) -> str:
    """A size as people write it."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes >= _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.3g} {unit}"
    return f"{size_bytes} bytes"


def shape_of_size(size_bytes: int) -> Shape:
    """An adapter of about so many bytes, with as many matrices as one of a model with 32 layers has."""
    rank = _HIGH_RANK if size_bytes >= _HIGH_FROM_BYTES else _LOW_RANK
    width = max(1, round(size_bytes / (_LAYERS * len(_MODULES) * 2 * rank * _ITEM_BYTES)))
    names = (f"model.layers.{layer}.mlp.{leaf}" for layer in range(_LAYERS) for leaf in _MODULES)
    label = show_size(size_bytes).replace(" ", "")
    return Shape(label=label, rank=rank, modules=dict.fromkeys(names, (width, width)))


def shape_of_rank(base: BaseModel, rank: int) -> Shape:
    """An adapter of this rank for every matrix of the model's layers; BadInputError if they are not known."""
    modules = {
        name: shape for name, shape in base.modules.items() if shape is not None and _LAYER.search(name)
    }
    if not modules:
        raise BadInputError(f"--model: {base.name}: its matrices' sizes are not known (it is quantised)")
    return Shape(label=f"r{rank}", rank=rank, modules=modules)


@contextmanager
def made(shape: Shape, parent: Path) -> Iterator[FetchSubject]:
    """The adapter, while the `with` lasts; WorkFailedError if the disk does not take it."""
    needed_bytes = 2 * shape.body_bytes
    if (free_bytes := shutil.disk_usage(parent).free) < 1.1 * needed_bytes:
        raise WorkFailedError(
            f"{parent}: {show_size(free_bytes)} are free, {shape.label} needs {show_size(needed_bytes)}"
        )
    where = Path(tempfile.mkdtemp(prefix=f"adapter-{shape.label}-", dir=parent))
    try:
        try:
            subject = _made(shape, where)
        except OSError as error:
            raise WorkFailedError(f"{where}: the adapter cannot be written: {error.strerror}") from error
        yield subject
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _made(shape: Shape, where: Path) -> FetchSubject:
    folder = where / "folder"
    folder.mkdir()
    _write(folder, shape)
    store = AdapterStore(where / "store", base=None, limits=StoreLimits(max_lora_rank=MAX_RANK))
    stored = store.add(f"bench-{shape.label}", str(folder))
    digest = stored.manifest.sha256
    version = version_id(stored.name, digest)
    head = store.segment_head(digest, version)
    return FetchSubject(
        shape=shape,
        version=version,
        folder=folder,
        stored=stored.directory,
        digest=digest,
        head_sha256=sha256(head).hexdigest(),
        body_bytes=SegmentHead.decode(head).body_bytes,
    )


def _write(folder: Path, shape: Shape) -> None:
    """A PEFT folder in bfloat16; what the values are costs nothing to read, so a few are repeated."""
    import numpy as np

    drawn = np.random.default_rng(0).standard_normal(65_537, dtype=np.float32).view(np.uint32)
    values = (drawn >> 16).astype(np.uint16)  # the upper half of a float32 is a bfloat16
    header: dict[str, Any] = {}
    end = 0
    for name, (rows, columns) in shape.modules.items():
        for side, sizes in (("A", [shape.rank, columns]), ("B", [rows, shape.rank])):
            begin, end = end, end + sizes[0] * sizes[1] * _ITEM_BYTES
            header[f"base_model.model.{name}.lora_{side}.weight"] = {
                "dtype": "BF16",
                "shape": sizes,
                "data_offsets": [begin, end],
            }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    piece = np.resize(values, _PIECE_BYTES // _ITEM_BYTES).tobytes()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for begin in range(0, end, _PIECE_BYTES):
            file.write(piece[: end - begin])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "bench/model",
        "r": shape.rank,
        "lora_alpha": 2 * shape.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
