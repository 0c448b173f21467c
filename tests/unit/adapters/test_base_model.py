"""The base model's description is read from headers alone, sharded or not, and checked."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraserve.adapters import inspect_adapter, read_base
from loraserve.errors import BadInputError
from loraserve.samples import build_adapter, build_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 10}
WEIGHTS = {
    "model.layers.0.self_attn.q_proj.weight": np.zeros((4, 6), np.float32),
    "model.layers.1.self_attn.q_proj.weight": np.zeros((4, 6), np.float32),
    "model.norm.weight": np.zeros(6, np.float32),
}


def _folder(path: Path, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_sample_checkpoint_is_read(tmp_path: Path) -> None:
    model = build_checkpoint(tmp_path / "model")
    base = read_base(model)
    assert (base.name, base.architecture) == ("loraserve/sample-llama", "LlamaForCausalLM")
    assert (base.num_layers, base.vocab_size) == (2, 1024)
    assert base.modules["model.layers.1.mlp.down_proj"] == (256, 512)
    assert base.modules["model.layers.0.self_attn.k_proj"] == (128, 256)
    layer = 2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512)
    assert base.lora_values_per_rank(with_vocabulary=False) == 2 * layer
    both_ends = 2 * (1024 + 256)
    assert base.lora_values_per_rank(with_vocabulary=True) == 2 * layer + both_ends
    adapter = build_adapter(tmp_path / "adapter", model, rank=4, seed=0)
    manifest = inspect_adapter(adapter, base=base, max_lora_rank=8)
    assert (manifest.rank, manifest.num_modules, manifest.warnings) == (4, 14, ())


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    names = list(WEIGHTS)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(names):
        file = f"model-{number}.safetensors"
        save_file({name: WEIGHTS[name]}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    base = read_base(folder)
    assert base.num_layers == 2
    assert dict(base.modules) == {
        "model.layers.0.self_attn.q_proj": (4, 6),
        "model.layers.1.self_attn.q_proj": (4, 6),
    }


def test_a_quantised_checkpoint_names_its_modules_without_shapes(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {**CONFIG, "quantization_config": {"quant_method": "awq"}})
    tensors = {"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 1), np.int32)}
    save_file(tensors, folder / "model.safetensors")
    base = read_base(folder)
    assert dict(base.modules) == {"model.layers.0.mlp.up_proj": None}
    assert base.lora_values_per_rank(with_vocabulary=True) == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "expected a JSON object"),
        ({"vocab_size": 10}, "architectures"),
        ({"architectures": [], "vocab_size": 10}, "architectures"),
        ({"architectures": ["X"]}, "vocab_size"),
        ({"architectures": ["X"], "vocab_size": 0}, "vocab_size"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: object, words: str) -> None:
    folder = _folder(tmp_path, config)
    save_file(WEIGHTS, folder / "model.safetensors")
    with pytest.raises(BadInputError, match=words):
        read_base(folder)


def test_missing_or_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such folder"):
        read_base(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match=r"config\.json: cannot read"):
        read_base(tmp_path)
    folder = _folder(tmp_path)
    with pytest.raises(BadInputError, match=r"no model\.safetensors"):
        read_base(folder)
    (folder / "model.safetensors").write_bytes(b"123")
    with pytest.raises(BadInputError, match="truncated"):
        read_base(folder)
    save_file({"a.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    with pytest.raises(BadInputError, match="no module of a layer"):
        read_base(folder)
    broken: tuple[object, ...] = ({"a": "../x"}, {"a": 3}, {}, [])
    for weight_map in broken:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadInputError, match="weight_map"):
            read_base(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInputError, match="not valid JSON"):
        read_base(folder)
