"""PEFT adapter folders made to order, and the description of a small base model that they fit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from loraserve.adapters import BaseModel

Tensors = dict[str, NDArray[Any]]
PREFIX = "base_model.model.model.layers.0.self_attn"


class AdapterMaker:
    """Writes PEFT folders; the default one is sound: rank 4, alpha 8, q_proj and v_proj of layer 0."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made = 0

    def tensors(self, rank: int = 4, *, seed: int = 0) -> Tensors:
        """The tensors of the default adapter."""
        rng = np.random.default_rng(seed)
        shapes = {"q_proj": (16, 16), "v_proj": (8, 16)}
        tensors: Tensors = {}
        for module, (outputs, inputs) in shapes.items():
            tensors[f"{PREFIX}.{module}.lora_A.weight"] = rng.standard_normal((rank, inputs), np.float32)
            tensors[f"{PREFIX}.{module}.lora_B.weight"] = rng.standard_normal((outputs, rank), np.float32)
        return tensors

    def config(self, **changes: object) -> dict[str, object]:
        """The config of the default adapter, changed."""
        return {
            "base_model_name_or_path": "acme/base",
            "bias": "none",
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "peft_type": "LORA",
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            **changes,
        }

    def __call__(
        self, *, tensors: Mapping[str, NDArray[Any]] | None = None, name: str | None = None, **changes: object
    ) -> Path:
        """Write a folder with these tensors and config changes."""
        self._made += 1
        folder = self.directory / (name or f"adapter-{self._made}")
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config(**changes)))
        save_file(dict(self.tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
        return folder


def one_line(error: Exception) -> str:
    """The error's message, which must be one printable line."""
    message = str(error)
    assert message
    assert message.isprintable()
    return message


def small_base() -> BaseModel:
    """A base model with q_proj (16x16) and v_proj (8x16) in two layers."""
    attention: dict[str, tuple[int, int] | None] = {}
    for layer in range(2):
        attention[f"model.layers.{layer}.self_attn.q_proj"] = (16, 16)
        attention[f"model.layers.{layer}.self_attn.v_proj"] = (8, 16)
    return BaseModel(
        name="acme/base",
        architecture="LlamaForCausalLM",
        num_layers=2,
        vocab_size=100,
        modules={"model.embed_tokens": (100, 16), "lm_head": (100, 16), **attention},
    )
