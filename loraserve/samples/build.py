"""Builds the whole sample set in one folder, once: complete or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from loraserve.errors import BadInputError, WorkFailedError
from loraserve.samples.adapter import build_adapter
from loraserve.samples.checkpoint import build_checkpoint, write_json

DEFAULT_RANKS = (8, 16, 32, 64, 128)
_STAMP = "samples.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """The base model's folder, and the adapters' folders by name (`rank-8` and so on)."""

    model: Path
    adapters: Mapping[str, Path]


def build_samples(directory: Path, *, ranks: Sequence[int] = DEFAULT_RANKS, seed: int = 0) -> SampleSet:
    """Build the checkpoint and one adapter per rank in `directory`, or reuse what is there.

    A folder that this function built from another recipe is replaced; one with other files in it is refused
    with BadInputError.
    """
    if len(set(ranks)) != len(ranks):
        raise BadInputError(f"ranks {list(ranks)}: expected each rank once")
    directory = directory.absolute()
    recipe = _recipe(ranks, seed)
    samples = SampleSet(
        model=directory / "model",
        adapters={f"rank-{rank}": directory / "adapters" / f"rank-{rank}" for rank in ranks},
    )
    if _is_current(directory, recipe):
        return samples
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _build_into(staging, ranks, seed, recipe)
        _install(staging, directory, recipe)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return samples


def _build_into(directory: Path, ranks: Sequence[int], seed: int, recipe: str) -> None:
    model = build_checkpoint(directory / "model", seed=seed)
    for rank in ranks:
        build_adapter(directory / "adapters" / f"rank-{rank}", model, rank=rank, seed=seed)
    write_json(directory / _STAMP, {"recipe": recipe, "files": _sizes(directory)})
    directory.chmod(0o755)


def _install(staging: Path, directory: Path, recipe: str) -> None:
    """Move the finished folder into place; a process that was faster with the same recipe wins."""
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            os.replace(directory, old / "old")
        except FileNotFoundError:
            pass
        finally:
            shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(staging, directory)
    except OSError as error:
        if not _is_current(directory, recipe):
            raise WorkFailedError(
                f"{directory}: cannot put the samples in place: {error.strerror}"
            ) from error


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise BadInputError(f"{directory}: is a file; expected a folder for the samples")
    if any(directory.iterdir()) and not (directory / _STAMP).is_file():
        raise BadInputError(f"{directory}: holds other files; expected a new or empty folder for the samples")


def _is_current(directory: Path, recipe: str) -> bool:
    try:
        stamp: Any = json.loads((directory / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(stamp, dict) and stamp.get("recipe") == recipe and stamp.get("files") == _sizes(directory)
    )


def _sizes(directory: Path) -> dict[str, int]:
    """Every file but the stamp, with its size in bytes."""
    return {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != _STAMP
    }


def _recipe(ranks: Sequence[int], seed: int) -> str:
    """A digest of this package's code and the arguments, so that a changed recipe rebuilds the samples."""
    digest = hashlib.sha256(repr((tuple(ranks), seed)).encode())
    sources = (
        entry for entry in resources.files("loraserve.samples").iterdir() if entry.name.endswith(".py")
    )
    for entry in sorted(sources, key=lambda entry: entry.name):
        digest.update(entry.read_bytes())
    return digest.hexdigest()
