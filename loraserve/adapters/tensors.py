"""Checks an adapter's tensors: their names, shapes and dtypes against its config and the base model.

Works on the header alone; `finite` looks at the values.
"""

import re
from collections.abc import Mapping, Sequence

from loraserve.adapters.base import BaseModel
from loraserve.adapters.peft_config import PeftConfig
from loraserve.adapters.safetensors_file import TensorInfo, show
from loraserve.errors import AdapterRejectedError

_PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
_VOCABULARY = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings"}
_DTYPES = {"F32", "F16", "BF16"}

Sides = dict[str, TensorInfo]


def check_tensors(
    tensors: Sequence[TensorInfo], *, config: PeftConfig, base: BaseModel | None, where: str
) -> Mapping[str, int]:
    """The rank of each module; AdapterRejectedError for the first tensor that cannot be served."""
    pairs: dict[str, Sides] = {}
    for tensor in tensors:
        match = _LORA.fullmatch(tensor.name)
        _refuse_by_name(tensor.name, match["module"] if match else None, where)
        assert match is not None  # _refuse_by_name raises for any other name
        if tensor.dtype not in _DTYPES:
            expected = ", ".join(sorted(_DTYPES))
            raise _bad(where, tensor, f"dtype {show(tensor.dtype)} is not supported; expected {expected}")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise _bad(where, tensor, f"its shape is {list(tensor.shape)}; expected a matrix")
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    if not pairs:
        raise AdapterRejectedError(f"{where}: adapter_model.safetensors holds no tensors")
    return {module: _check_module(module, sides, config, base, where) for module, sides in pairs.items()}


def _check_module(module: str, sides: Sides, config: PeftConfig, base: BaseModel | None, where: str) -> int:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise AdapterRejectedError(f"{where}: module {show(module)} has lora_{other} but no lora_{side}")
    (rank_a, inputs), (outputs, rank_b) = sides["A"].shape, sides["B"].shape
    if rank_a != rank_b:
        raise AdapterRejectedError(
            f"{where}: module {show(module)}: lora_A has rank {rank_a} but lora_B has rank {rank_b}"
        )
    if rank_a != config.rank_of(module):
        raise AdapterRejectedError(
            f"{where}: module {show(module)}: its tensors have rank {rank_a}, "
            f"but adapter_config.json says {config.rank_of(module)}"
        )
    if not config.targets(module):
        raise AdapterRejectedError(
            f"{where}: module {show(module)}: its tensors are there, but target_modules does not name it"
        )
    if base is not None:
        _check_base(module, (outputs, inputs), base, where)
    return rank_a


def _check_base(module: str, shape: tuple[int, int], base: BaseModel, where: str) -> None:
    layer = _LAYER.search(module)
    if layer and int(layer[1]) >= base.num_layers:
        raise AdapterRejectedError(
            f"{where}: module {show(module)}: the base model {base.name} has only {base.num_layers} layers"
        )
    if module not in base.modules:
        raise AdapterRejectedError(
            f"{where}: module {show(module)}: the base model {base.name} ({base.architecture}) has no such "
            "linear module"
        )
    expected = base.modules[module]
    if expected is not None and shape != expected:
        raise AdapterRejectedError(
            f"{where}: module {show(module)}: it changes a {shape[0]}x{shape[1]} matrix, "
            f"but the base model {base.name} has {expected[0]}x{expected[1]} (outputs x inputs)"
        )


def _refuse_by_name(name: str, module: str | None, where: str) -> None:
    """Refuse a tensor that is not lora_A or lora_B of a plain linear module, saying what it belongs to."""
    parts = name.split(".")
    if ".experts." in name or name.endswith(".experts"):
        reason = "LoRA on MoE experts is not supported"
    elif "lora_magnitude_vector" in parts:
        reason = "it belongs to DoRA, which is not supported"
    elif "trainable_tokens" in name or "token_adapter" in parts:
        reason = "trained tokens are not supported"
    elif _VOCABULARY & set(parts) or "lora_embedding" in name:
        reason = "a changed vocabulary (embeddings or output layer) is not supported"
    elif parts[-1] == "bias" or "bias" in parts[-2:]:
        reason = "trained biases are not supported"
    elif "modules_to_save" in parts or (name.startswith(_PREFIX) and "lora_" not in name):
        reason = "modules saved whole (modules_to_save) are not supported"
    elif module is None:
        reason = f"unexpected tensor; expected {_PREFIX}MODULE.lora_A.weight or lora_B.weight"
    else:
        return
    raise AdapterRejectedError(f"{where}: tensor {show(name)}: {reason}")


def _bad(where: str, tensor: TensorInfo, reason: str) -> AdapterRejectedError:
    return AdapterRejectedError(f"{where}: tensor {show(tensor.name)}: {reason}")
