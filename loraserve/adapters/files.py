"""Opens, streams and writes an adapter's two files with bounded memory and no trust in what lies there."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from loraserve.adapters.safetensors_file import Header, TensorInfo, show
from loraserve.errors import AdapterRejectedError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1024**2
SLICE_BYTES = 8 * 1024**2
_SCAN_BYTES = 256 * 1024
"""What was read is hashed and looked through while it is still in the core's cache."""

_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""dtype → (how to read it as integers, the bits of its exponent): all set means infinity or NaN."""


@contextmanager
def open_member(directory: Path, name: str, *, max_bytes: int, where: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file of an adapter's folder; yields it with its size in bytes.

    A link is followed only while it stays in the folder, or leads from a snapshot of the Hugging Face cache
    to the blobs of the same repository.
    """
    path = directory / name
    try:
        target = path.resolve(strict=True)
        roots = [directory.resolve()]
        if roots[0].parent.name == "snapshots":
            roots.append(roots[0].parents[1] / "blobs")
        if not any(target.is_relative_to(root) for root in roots):
            raise AdapterRejectedError(f"{where}: {name} is a link out of the adapter's folder")
        # Without O_NONBLOCK, opening a named pipe waits for a writer for ever.
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(directory, name, where) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterRejectedError(f"{where}: cannot read {name}: {_reason(error)}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterRejectedError(f"{where}: {name} is not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise AdapterRejectedError(
                f"{where}: {name} has {status.st_size} bytes; at most {max_bytes} are allowed"
            )
        yield file, status.st_size


def scan_weights(file: BinaryIO, header: Header, where: str) -> bytes:
    """Read the whole file once, in slices: refuse NaN and infinity, and return its sha256."""
    file.seek(0)
    digest = hashlib.sha256(file.read(header.data_start))
    for tensor in header.tensors:
        left = tensor.end - tensor.begin
        while left:
            wanted = min(_SCAN_BYTES, left)
            piece = file.read(wanted)
            if len(piece) < wanted:
                raise AdapterRejectedError(f"{where}: {WEIGHTS_FILE}: truncated while it was read")
            digest.update(piece)
            left -= len(piece)
            _refuse_non_finite(piece, tensor, where)
    return digest.digest()


def write_file(path: Path, pieces: Iterator[bytes]) -> None:
    """Write a new read-only file and bring it to the disk."""
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_non_finite(piece: bytes, tensor: TensorInfo, where: str) -> None:
    integers, exponent = _EXPONENTS[tensor.dtype]
    values = np.frombuffer(piece, dtype=integers)
    if bool(((values & exponent) == exponent).any()):
        raise AdapterRejectedError(f"{where}: tensor {show(tensor.name)} holds NaN or infinity")


def _missing(directory: Path, name: str, where: str) -> AdapterRejectedError:
    if not directory.is_dir():
        return AdapterRejectedError(f"{where}: no such folder; expected one with {CONFIG_FILE}")
    pickled = [other for other in _PICKLED if (directory / other).exists()]
    if name == WEIGHTS_FILE and pickled:
        return AdapterRejectedError(
            f"{where}: {pickled[0]} is pickled, which can run code; expected {WEIGHTS_FILE}"
        )
    return AdapterRejectedError(f"{where}: {name} is missing")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
