"""The head of a segment: which adapter version it is, and where its matrices lie in the body.

Owns the order of a body and the head's one canonical form: the same adapter gives the same bytes everywhere,
so that a head can be trusted by its sha256. Places are not written down but follow from order, shapes and
dtypes: a head from a stranger cannot make tensors overlap or leave the body. Knows nothing of files or
memory.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from loraserve.adapters.body_hashes import FAST_BYTES, SHA256_BYTES, BodyHashes, root_of
from loraserve.adapters.safetensors_file import ITEM_BYTES, TensorInfo, show

CHUNK_BYTES = 1024**2
MAX_HEAD_BYTES = 16 * 1024**2
_ALIGN_BYTES = 64
_NO_SHA256 = "0" * 64
_PREFIX = "base_model.model."
_PACKED = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)
"""The modules of a layer as engines run through them."""
_LAYER = re.compile(r"\.(\d{1,9})\.", re.ASCII)


class SegmentError(ValueError):
    """A segment is not there, not sealed, or not what its reference or its head says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSegment:
    """One module of an adapter: its PEFT name, its tensors' places in the body, what B·A is multiplied by."""

    name: str
    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        """The module's true rank."""
        return self.a.shape[0]


_Size = Annotated[int, Meta(ge=1, le=2**31)]
_Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Dtype = Literal["F32", "F16", "BF16"]


class _Module(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    scaling: float
    rank: _Size
    inputs: _Size
    outputs: _Size
    a_dtype: _Dtype
    b_dtype: _Dtype


class _Wire(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What is written down, in this order, as JSON without spaces."""

    format: Literal[2] = 2
    name: Annotated[str, Meta(min_length=1, max_length=512)]
    digest: _Sha256
    modules: Annotated[tuple[_Module, ...], Meta(min_length=1)]
    body_sha256: _Sha256
    chunk_bytes: Annotated[int, Meta(ge=1, le=2**30)]
    chunk_hashes: bytes
    chunk_sha256s: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHead:
    """One adapter version: its content's digest, the body's modules in their order, and the body's hashes.

    `name` is the version's id; `digest` the sha256 of the adapter's content as the registry knows it; `rank`
    the highest of the modules. `chunk_hashes` holds xxh3_64 of every `chunk_bytes` of the body, 8 bytes each,
    big endian, `chunk_sha256s` their sha256, 32 bytes each, and `body_sha256` is the root over the latter
    (`body_hashes.root_of`).
    """

    name: str
    digest: str
    rank: int
    body_bytes: int
    body_sha256: str
    chunk_bytes: int
    chunk_hashes: bytes
    chunk_sha256s: bytes
    modules: tuple[ModuleSegment, ...]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors in the order of the body: each module's A, then its B."""
        return tuple(tensor for module in self.modules for tensor in (module.a, module.b))

    @property
    def num_chunks(self) -> int:
        """How many chunks the body has; the last one may be shorter."""
        return -(-self.body_bytes // self.chunk_bytes)

    def chunk_hash(self, index: int) -> bytes:
        """The xxh3_64 of a chunk."""
        return self.chunk_hashes[index * FAST_BYTES : (index + 1) * FAST_BYTES]

    def chunk_sha256(self, index: int) -> bytes:
        """The sha256 of a chunk."""
        return self.chunk_sha256s[index * SHA256_BYTES : (index + 1) * SHA256_BYTES]

    def encode(self) -> bytes:
        """The canonical bytes; SegmentError for names that are no text."""
        wire = _Wire(
            name=self.name,
            digest=self.digest,
            modules=tuple(_written(module) for module in self.modules),
            body_sha256=self.body_sha256,
            chunk_bytes=self.chunk_bytes,
            chunk_hashes=self.chunk_hashes,
            chunk_sha256s=self.chunk_sha256s,
        )
        try:
            return msgspec.json.encode(wire)
        except UnicodeEncodeError as error:
            raise SegmentError("a name in it is not text") from error

    @staticmethod
    def decode(raw: bytes) -> "SegmentHead":
        """Read a head that may come from anybody; SegmentError for what `encode` would not have written."""
        if len(raw) > MAX_HEAD_BYTES:
            raise SegmentError(f"its head has {len(raw)} bytes; at most {MAX_HEAD_BYTES} are allowed")
        try:
            wire = msgspec.json.decode(raw, type=_Wire)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise SegmentError(f"its head cannot be read: {show(str(error))}") from error
        names = [module.name for module in wire.modules]
        if len(set(names)) != len(names):
            raise SegmentError("its head names a module twice")
        if names != sorted(names, key=_engine_order):
            raise SegmentError("its head has the modules in another order")
        head = _placed(wire)
        for hashes, size in ((head.chunk_hashes, FAST_BYTES), (head.chunk_sha256s, SHA256_BYTES)):
            if len(hashes) != head.num_chunks * size:
                raise SegmentError(f"its head has {len(hashes)} bytes of hashes for {head.num_chunks} chunks")
        if head.body_sha256 != _root(head):
            raise SegmentError("its head has a root that is not that of its hashes")
        if msgspec.json.encode(wire) != raw:
            raise SegmentError("its head is not in the canonical form")
        return head

    def check(self, *, name: str, digest: str, max_lora_rank: int, max_bytes: int) -> None:
        """SegmentError unless it is the head of this version and fits what is allowed.

        Also for heads that were made by hand: the tensors must be where the body's order puts them.
        """
        self.check_fits(name=name, digest=digest, max_lora_rank=max_lora_rank, max_bytes=max_bytes)
        if SegmentHead.decode(self.encode()) != self:
            raise SegmentError("its tensors are not where the order of a body puts them")

    def check_fits(self, *, name: str, digest: str, max_lora_rank: int, max_bytes: int) -> None:
        """As `check`, for what `decode` gave."""
        if self.name != name:
            raise SegmentError(f"it holds {show(self.name)}, expected {show(name)}")
        if self.digest != digest:
            raise SegmentError(f"its content has sha256 {self.digest[:16]}, expected {digest[:16]}")
        if self.rank > max_lora_rank:
            raise SegmentError(f"its rank {self.rank} is above {max_lora_rank}")
        if self.body_bytes > max_bytes:
            raise SegmentError(f"its body has {self.body_bytes} bytes; at most {max_bytes} are allowed")


def plan_head(
    tensors: Iterable[TensorInfo], scalings: Mapping[str, float], *, name: str, digest: str = _NO_SHA256
) -> SegmentHead:
    """The head of an adapter whose modules are scaled so, with its hashes still to come (see `hashed`).

    `tensors` are those of a checked weights file. The encoded length does not depend on hashes and digest.
    SegmentError for what cannot be written down.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    modules = []
    for module in sorted(scalings, key=_engine_order):
        a, b = (by_name[f"{_PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        written = _Module(
            module,
            scalings[module],
            a.shape[0],
            a.shape[1],
            b.shape[0],
            _dtype(a),
            _dtype(b),
        )
        modules.append(written)
    blank = _placed(
        _Wire(
            name=name,
            digest=digest,
            modules=tuple(modules),
            body_sha256=_NO_SHA256,
            chunk_bytes=CHUNK_BYTES,
            chunk_hashes=b"",
            chunk_sha256s=b"",
        )
    )
    zeros = BodyHashes(
        fast=bytes(blank.num_chunks * FAST_BYTES), sha256=bytes(blank.num_chunks * SHA256_BYTES)
    )
    head = hashed(blank, digest=digest, hashes=zeros)
    SegmentHead.decode(head.encode())
    return head


def hashed(head: SegmentHead, *, digest: str, hashes: BodyHashes) -> SegmentHead:
    """The head with what only the bytes could tell; it is encoded in as many bytes as before."""
    told = replace(head, digest=digest, chunk_hashes=hashes.fast, chunk_sha256s=hashes.sha256)
    return replace(told, body_sha256=_root(told))


def _root(head: SegmentHead) -> str:
    return root_of(head.chunk_sha256s, body_bytes=head.body_bytes, chunk_bytes=head.chunk_bytes)


def _engine_order(module: str) -> tuple[int, int, str]:
    """Layer by layer, modules as the engine packs them; what belongs to no layer comes first."""
    layer = _LAYER.search(module)
    leaf = module.rpartition(".")[2]
    return (int(layer[1]) if layer else -1, _PACKED.index(leaf) if leaf in _PACKED else len(_PACKED), module)


def _dtype(tensor: TensorInfo) -> _Dtype:
    # Checked with the tensors; other values would fail when the head is read again.
    return tensor.dtype  # type: ignore[return-value]


def _written(module: ModuleSegment) -> _Module:
    (rank, inputs), outputs = module.a.shape, module.b.shape[0]
    return _Module(module.name, module.scaling, rank, inputs, outputs, _dtype(module.a), _dtype(module.b))


def _placed(wire: _Wire) -> SegmentHead:
    """The head with every tensor's place: one after the other, each aligned, zeros between."""
    modules: list[ModuleSegment] = []
    end = 0
    for module in wire.modules:
        a = _tensor(module.name, "A", module.a_dtype, (module.rank, module.inputs), end)
        b = _tensor(module.name, "B", module.b_dtype, (module.outputs, module.rank), a.end)
        modules.append(ModuleSegment(name=module.name, a=a, b=b, scaling=module.scaling))
        end = b.end
    return SegmentHead(
        name=wire.name,
        digest=wire.digest,
        rank=max(module.rank for module in modules),
        body_bytes=end,
        body_sha256=wire.body_sha256,
        chunk_bytes=wire.chunk_bytes,
        chunk_hashes=wire.chunk_hashes,
        chunk_sha256s=wire.chunk_sha256s,
        modules=tuple(modules),
    )


def _tensor(module: str, side: str, dtype: str, shape: Sequence[int], after: int) -> TensorInfo:
    begin = -(-after // _ALIGN_BYTES) * _ALIGN_BYTES
    return TensorInfo(
        name=f"{_PREFIX}{module}.lora_{side}.weight",
        dtype=dtype,
        shape=tuple(shape),
        begin=begin,
        end=begin + math.prod(shape) * ITEM_BYTES[dtype],
    )
