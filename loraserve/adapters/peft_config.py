"""Reads the whole of a PEFT adapter_config.json and refuses by name what LoRAServe cannot apply.

Engines drop keys that they do not know, which serves such adapters wrongly without a word; so every key is
either applied, known to be of no effect at serving time, or refused.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from loraserve.adapters.safetensors_file import show
from loraserve.errors import AdapterRejectedError

Number = TypeVar("Number", int, float)

_MAX_RANK = 65_536

_OF_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Keys that matter in training only, or that describe the file's origin."""

_APPLIED = frozenset(
    {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora"}
)

_PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights alone."""


def _is_set(value: object) -> bool:
    return bool(value)


_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (_is_set, "DoRA is not supported; expected plain LoRA or rsLoRA"),
    "use_qalora": (_is_set, "QA-LoRA is not supported; expected plain LoRA or rsLoRA"),
    "use_bdlora": (_is_set, "BD-LoRA is not supported; expected plain LoRA or rsLoRA"),
    "alora_invocation_tokens": (_is_set, "activated LoRA is not supported; expected plain LoRA or rsLoRA"),
    "arrow_config": (_is_set, "Arrow routing is not supported; expected plain LoRA or rsLoRA"),
    "modules_to_save": (_is_set, "modules saved whole are not supported; expected LoRA matrices alone"),
    "bias": (lambda value: value not in (None, "none"), "trained biases are not supported; expected 'none'"),
    "lora_bias": (_is_set, "LoRA biases are not supported; expected false"),
    "trainable_token_indices": (_is_set, "trained tokens are not supported; expected null"),
    "target_parameters": (_is_set, "LoRA on bare parameters is not supported; expected null"),
    "layer_replication": (_is_set, "replicated layers are not supported; expected null"),
    "fan_in_fan_out": (_is_set, "transposed weights are not supported; expected false"),
    "megatron_config": (_is_set, "Megatron layers are not supported; expected null"),
    "init_lora_weights": (
        lambda value: not any(value is plain or value == plain for plain in _PLAIN_INIT),
        "this initialisation changes the base's weights; convert the adapter to plain LoRA when saving it",
    ),
    "task_type": (
        lambda value: value not in (None, "CAUSAL_LM"),
        "only text generation is supported; expected 'CAUSAL_LM'",
    ),
}

_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What of an adapter_config.json bears on serving.

    `target_modules` None means that a regular expression chose them. Patterns map the end of a module's name
    (the whole of it after `^`) to that module's rank or alpha.
    """

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | None
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """The rank that the config gives to a module."""
        return next((rank for key, rank in self.rank_pattern if _matches(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha that the config gives to a module."""
        return next((alpha for key, alpha in self.alpha_pattern if _matches(key, module)), self.alpha)

    def scaling_of(self, module: str) -> float:
        """What the product B·A of a module is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether target_modules names the module; true where a regular expression stands there."""
        if self.target_modules is None:
            return True
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)


def parse_peft_config(raw: bytes, where: str) -> PeftConfig:
    """Parse and check adapter_config.json; AdapterRejectedError names the key and what would be right."""
    tree = _object(raw, where)
    if tree.get("peft_type") != "LORA":
        raise _bad(where, "peft_type", tree.get("peft_type"), "expected 'LORA'")
    for key, value in tree.items():
        _refuse(key, value, where)
    return PeftConfig(
        rank=_rank(tree.get("r"), where, "r"),
        alpha=_alpha(tree.get("lora_alpha"), where, "lora_alpha"),
        use_rslora=_flag(tree.get("use_rslora"), where, "use_rslora"),
        target_modules=_target_modules(tree.get("target_modules"), where),
        rank_pattern=_pattern(tree.get("rank_pattern"), where, "rank_pattern", _rank),
        alpha_pattern=_pattern(tree.get("alpha_pattern"), where, "alpha_pattern", _alpha),
        base_model=_base_model(tree.get("base_model_name_or_path")),
    )


def _matches(key: str, module: str) -> bool:
    if key.startswith("^"):
        return module == key[1:]
    return module == key or module.endswith(f".{key}")


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterRejectedError(f"{where}: adapter_config.json is not valid JSON") from error
    if not isinstance(tree, dict):
        raise AdapterRejectedError(f"{where}: adapter_config.json is not a JSON object")
    return tree


def _refuse(key: str, value: Any, where: str) -> None:
    if key in _REFUSED:
        is_refused, reason = _REFUSED[key]
        if is_refused(value):
            raise _bad(where, key, value, reason)
    elif key not in _APPLIED and key not in _OF_NO_EFFECT and value not in (None, False, 0, "", [], {}):
        raise _bad(where, key, value, "LoRAServe does not know how to apply it")


def _bad(where: str, key: str, value: object, reason: str) -> AdapterRejectedError:
    return AdapterRejectedError(
        f"{where}: adapter_config.json: {_name(key)} is {show_value(value)}: {reason}"
    )


def show_value(value: object) -> str:
    """A value of an untrusted file, short and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _name(key: str) -> str:
    return key if re.fullmatch(r"\w{1,80}", key, re.ASCII) else show(key)


def _rank(value: object, where: str, key: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise _bad(where, key, value, f"expected a whole number from 1 to {_MAX_RANK}")
    return value


def _alpha(value: object, where: str, key: str) -> float:
    # Beyond 1e9 an integer may not fit a float, and no adapter means it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 <= value <= 1e9:
        raise _bad(where, key, value, "expected a finite number")
    return float(value)


def _flag(value: object, where: str, key: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _bad(where, key, value, "expected true or false")


def _target_modules(value: object, where: str) -> tuple[str, ...] | None:
    if isinstance(value, str) and value:
        return None
    if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise _bad(where, "target_modules", value, "expected a list of module names or a regular expression")


def _pattern(
    value: object, where: str, key: str, parse: Callable[[object, str, str], Number]
) -> tuple[tuple[str, Number], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _bad(where, key, value, "expected a table from module names to numbers")
    for name in value:
        # Regular expressions of strangers can run for ever.
        if not _PATTERN_KEY.fullmatch(name):
            raise _bad(where, key, name, "expected plain module names, not regular expressions")
    return tuple((name, parse(item, where, f"{key}.{name}")) for name, item in value.items())


def _base_model(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
