"""Builds sample LoRA adapters in the layout that PEFT writes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraserve.errors import BadInputError
from loraserve.samples.checkpoint import Matrix, write_json

LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear modules of a Llama layer that an adapter may target."""

_RELATIVE_CHANGE = 0.6
"""How large the change of a weight matrix is, against the matrix itself."""


def build_adapter(
    directory: Path,
    base: Path,
    *,
    rank: int,
    seed: int,
    target_modules: Sequence[str] = LLAMA_MODULES,
    alpha: float | None = None,
    use_rslora: bool = False,
) -> Path:
    """Write a float32 PEFT LoRA adapter for the sample checkpoint `base` and return `directory`.

    `alpha` None means twice the rank. The change is so large that greedy output differs from the base's.
    """
    _check_recipe(rank, target_modules)
    from safetensors.numpy import save_file

    alpha = 2.0 * rank if alpha is None else alpha
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
    rng = np.random.default_rng([seed, rank])
    tensors: dict[str, Matrix] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (parent, rows, columns) in _shapes(config).items():
            if module not in target_modules:
                continue
            name = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            # Entries of B·A times the scaling come out at _RELATIVE_CHANGE / sqrt(columns).
            size_a = 1.0 / math.sqrt(columns)
            size_b = _RELATIVE_CHANGE / (scaling * math.sqrt(rank))
            tensors[f"{name}.lora_A.weight"] = _normal(rng, (rank, columns), size_a)
            tensors[f"{name}.lora_B.weight"] = _normal(rng, (rows, rank), size_b)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = _peft_config(config, rank, alpha, sorted(target_modules), use_rslora)
    write_json(directory / "adapter_config.json", settings)
    return directory


def _check_recipe(rank: int, target_modules: Sequence[str]) -> None:
    unknown = sorted(set(target_modules) - set(LLAMA_MODULES))
    if unknown or not target_modules:
        raise BadInputError(f"target_modules {unknown}: expected some of {', '.join(LLAMA_MODULES)}")
    if rank < 1:
        raise BadInputError(f"rank is {rank}; expected at least 1")


def _normal(rng: np.random.Generator, shape: tuple[int, int], size: float) -> Matrix:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(size)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    """Module → (its parent in a layer, output size, input size)."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        "q_proj": ("self_attn", queries, hidden),
        "k_proj": ("self_attn", keys, hidden),
        "v_proj": ("self_attn", keys, hidden),
        "o_proj": ("self_attn", hidden, queries),
        "gate_proj": ("mlp", intermediate, hidden),
        "up_proj": ("mlp", intermediate, hidden),
        "down_proj": ("mlp", hidden, intermediate),
    }


def _peft_config(
    config: dict[str, Any], rank: int, alpha: float, target_modules: list[str], use_rslora: bool
) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": config["_name_or_path"],
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": use_rslora,
    }
