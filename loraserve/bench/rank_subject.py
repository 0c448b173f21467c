"""The base model and the adapters that `bench rank` measures: generated on the spot, or given."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraserve.bench.rank_rows import RankedAdapter
from loraserve.engines.base import AdapterFiles
from loraserve.errors import BadInputError
from placement.types import VersionId

_MAX_LAYERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A generated subject: of the lowest and of the highest rank two adapters each, of others one."""

    hidden_size: int = 1024
    num_layers: int = 8
    ranks: tuple[int, ...] = (8, 32, 64, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) != len(self.ranks):
            raise BadInputError(f"--rank: got {list(self.ranks)}; expected ranks of at least 1, each once")
        if not 1 <= self.num_layers <= _MAX_LAYERS:
            raise BadInputError(f"--layers: got {self.num_layers}; expected 1 to {_MAX_LAYERS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured; `files` has every adapter by name."""

    description: str
    model: Path
    files: Mapping[str, AdapterFiles]

    @property
    def adapters(self) -> tuple[RankedAdapter, ...]:
        """The adapters in the order in which they were given."""
        return tuple(RankedAdapter(name=name, rank=one.rank) for name, one in self.files.items())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, lowest first."""
        return tuple(sorted({one.rank for one in self.files.values()}))


def generate(folder: Path, recipe: Recipe) -> Subject:
    """Build the model and its adapters in `folder`; BadInputError for sizes that cannot be."""
    from loraserve.samples import build_adapter, build_checkpoint

    model = build_checkpoint(
        folder / "model", seed=recipe.seed, hidden_size=recipe.hidden_size, num_layers=recipe.num_layers
    )
    outer = (min(recipe.ranks), max(recipe.ranks))
    files = {}
    for rank in sorted(recipe.ranks):
        for number in range(2 if rank in outer else 1):
            name = f"r{rank}-{'ab'[number]}"
            directory = build_adapter(folder / name, model, rank=rank, seed=recipe.seed + number)
            files[name] = _files(name, directory, rank)
    description = f"sample, hidden {recipe.hidden_size}, {recipe.num_layers} layers"
    return Subject(description=description, model=model, files=files)


def given(model: Path, adapters: Sequence[str], max_lora_rank: int) -> Subject:
    """A model's folder and adapters as NAME=DIR, checked as for serving; BadInputError says what is wrong."""
    from loraserve.adapters import inspect_adapter, read_base

    base = read_base(model)
    named = [_parse(text) for text in adapters]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice or not named:
        wrong = f"{twice[0]} is given twice" if twice else "none is given"
        raise BadInputError(f"--adapter: {wrong}; expected NAME=DIR with --model, each name once")
    files = {}
    for name, directory in named:
        manifest = inspect_adapter(directory, base=base, max_lora_rank=max_lora_rank)
        if manifest.needs_folding:
            raise BadInputError(
                f"--adapter {name}: its modules differ in rank or alpha; expected one of each"
            )
        files[name] = _files(name, directory, manifest.rank)
    return Subject(description=model.resolve().name, model=model, files=files)


def _parse(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise BadInputError(f"--adapter: got {text!r}; expected NAME=DIR")
    return name, Path(directory)


def _files(name: str, directory: Path, rank: int) -> AdapterFiles:
    size = sum(file.stat().st_size for file in directory.iterdir())
    return AdapterFiles(
        version_id=VersionId(f"{name}@{0:016x}"), directory=directory, rank=rank, size_bytes=size
    )
