"""What the registry needs to know of the base model, read from its files' headers alone."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.adapters.safetensors_file import SafetensorsError, TensorInfo, read_header
from loraserve.errors import BadInputError

_MAX_JSON_BYTES = 64 * 1024**2
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The base model's modules.

    `modules` maps a module's name to the (output, input) size of its weight matrix; None where the checkpoint
    is quantised and its stored shape says nothing.
    """

    name: str
    architecture: str
    num_layers: int
    vocab_size: int
    modules: Mapping[str, tuple[int, int] | None]

    def lora_values_per_rank(self, *, with_vocabulary: bool) -> int:
        """How many values one rank of an adapter has that targets every matrix of the layers, and with the
        vocabulary also the embeddings and the output layer; 0 where the checkpoint is quantised."""
        layers, vocabulary = 0, []
        for name, shape in self.modules.items():
            if shape is None:
                return 0
            if _LAYER.search(name):
                layers += sum(shape)
            elif shape[0] == self.vocab_size:
                vocabulary.append(sum(shape))
        # One matrix for both ends of the model has a slot at either.
        both_ends = 2 * vocabulary if len(vocabulary) == 1 else vocabulary
        return layers + (sum(both_ends) if with_vocabulary else 0)


def read_base(path: Path) -> BaseModel:
    """Read a Hugging Face model folder without loading weights; BadInputError if it is not a usable one."""
    if not path.is_dir():
        raise BadInputError(f"{path}: no such folder; expected a model folder with config.json")
    config = _read_object(path / "config.json")
    text_config = config.get("text_config")
    sizes = text_config if isinstance(text_config, dict) else config
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise BadInputError(f"{path}/config.json: architectures: expected a list with one class name")
    quantised = bool(config.get("quantization_config"))
    modules: dict[str, tuple[int, int] | None] = {}
    for file in _weight_files(path):
        for tensor in _tensors(file):
            modules |= _module(tensor, quantised)
    layers = {int(match[1]) for match in map(_LAYER.search, modules) if match}
    if not layers:
        raise BadInputError(
            f"{path}: its weights hold no module of a layer; expected a transformer checkpoint"
        )
    return BaseModel(
        name=str(config.get("_name_or_path") or path.name),
        architecture=architectures[0],
        num_layers=max(layers) + 1,
        vocab_size=_count(path, sizes, "vocab_size"),
        modules=modules,
    )


def _module(tensor: TensorInfo, quantised: bool) -> dict[str, tuple[int, int] | None]:
    module, _, kind = tensor.name.rpartition(".")
    if kind == "weight" and len(tensor.shape) == 2:
        return {module: None if quantised else (tensor.shape[0], tensor.shape[1])}
    if quantised and kind in {"qweight", "weight_packed"}:
        return {module: None}
    return {}


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            raise BadInputError(f"{path}: no model.safetensors and no model.safetensors.index.json")
        return [single]
    weight_map = _read_object(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _are_names(weight_map) else set()
    if not names:
        raise BadInputError(f"{index}: weight_map: expected a table from tensors to files of this folder")
    return [path / name for name in sorted(names)]


def _are_names(weight_map: dict[str, Any]) -> bool:
    return all(isinstance(name, str) and name and "/" not in name for name in weight_map.values())


def _tensors(file: Path) -> tuple[TensorInfo, ...]:
    try:
        with file.open("rb") as stream:
            return read_header(stream, file.stat().st_size).tensors
    except SafetensorsError as error:
        raise BadInputError(f"{file}: {error}") from error
    except OSError as error:
        raise BadInputError(f"{file}: cannot read the base model's weights: {error.strerror}") from error


def _read_object(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise BadInputError(f"{file}: larger than {_MAX_JSON_BYTES} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{file}: cannot read the base model: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: not valid JSON") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{file}: expected a JSON object")
    return value


def _count(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise BadInputError(f"{path}/config.json: {key}: expected a positive integer, got {value!r}")
    return value
