"""Every reason to refuse an adapter has its own one-line message, and sound adapters pass."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraserve.adapters import AdapterManifest, BaseModel, inspect_adapter
from loraserve.errors import AdapterRejectedError
from tests.support.adapter_maker import PREFIX, AdapterMaker, one_line

A = f"{PREFIX}.q_proj.lora_A.weight"
B = f"{PREFIX}.q_proj.lora_B.weight"


def _inspect(folder: Path, base: BaseModel | None, **limits: Any) -> AdapterManifest:
    return inspect_adapter(folder, base=base, **{"max_lora_rank": 64, **limits})


def _refusal(folder: Path, base: BaseModel | None, **limits: Any) -> str:
    with pytest.raises(AdapterRejectedError) as caught:
        _inspect(folder, base, **limits)
    message = one_line(caught.value)
    assert message.startswith(str(folder))
    return message


def test_a_plain_adapter_is_described(make: AdapterMaker, base: BaseModel) -> None:
    manifest = _inspect(make(), base)
    assert manifest.rank == 4
    assert manifest.size_bytes == sum(tensor.nbytes for tensor in make.tensors().values())
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert (manifest.alpha, manifest.use_rslora, manifest.dtypes) == (8.0, False, ("F32",))
    assert (manifest.num_tensors, manifest.num_modules) == (4, 2)
    assert not manifest.needs_folding
    assert manifest.warnings == ()


def test_rslora_is_accepted(make: AdapterMaker, base: BaseModel) -> None:
    assert _inspect(make(use_rslora=True), base).use_rslora


def test_the_base_may_be_unknown(make: AdapterMaker) -> None:
    assert _inspect(make(), None).rank == 4


def test_another_base_model_is_a_warning(make: AdapterMaker, base: BaseModel) -> None:
    (warning,) = _inspect(make(base_model_name_or_path="acme/other"), base).warnings
    assert "acme/other" in warning
    assert _inspect(make(base_model_name_or_path="/data/Base/"), base).warnings == ()


def test_the_digest_covers_config_and_weights(make: AdapterMaker, base: BaseModel) -> None:
    same = _inspect(make(), base).sha256
    assert _inspect(make(), base).sha256 == same
    others = {
        _inspect(make(lora_dropout=0.2), base).sha256,
        _inspect(make(tensors=make.tensors(seed=1)), base).sha256,
    }
    assert len(others | {same}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, ["use_dora", "DoRA"]),
        ({"use_qalora": True}, ["use_qalora", "QA-LoRA"]),
        ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora", "BD-LoRA"]),
        ({"peft_type": "IA3"}, ["peft_type", "'IA3'", "'LORA'"]),
        ({"peft_type": None}, ["peft_type", "'LORA'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head"]),
        ({"bias": "all"}, ["bias", "'all'", "'none'"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"target_parameters": ["experts.gate_up_proj"]}, ["target_parameters"]),
        ({"layer_replication": [[0, 1], [0, 2]]}, ["layer_replication"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"alora_invocation_tokens": [5]}, ["alora_invocation_tokens", "activated LoRA"]),
        ({"arrow_config": {"top_k": 3}}, ["arrow_config"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "pissa_niter_4", "convert"]),
        ({"task_type": "SEQ_CLS"}, ["task_type", "CAUSAL_LM"]),
        ({"new_trick": {"on": 1}}, ["new_trick", "does not know how to apply it"]),
        ({"r": 0}, ["r is 0", "whole number"]),
        ({"r": "8"}, ["r is '8'"]),
        ({"r": True}, ["r is True"]),
        ({"r": 10**30}, ["whole number from 1"]),
        ({"lora_alpha": "big"}, ["lora_alpha is 'big'", "finite"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha is inf"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"lora_alpha": None}, ["lora_alpha is None"]),
        ({"use_rslora": "yes"}, ["use_rslora is 'yes'"]),
        ({"target_modules": None}, ["target_modules is None"]),
        ({"target_modules": ["q_proj", 3]}, ["target_modules"]),
        ({"target_modules": ["q_proj"]}, ["v_proj", "target_modules does not name it"]),
        ({"rank_pattern": [1]}, ["rank_pattern"]),
        ({"rank_pattern": {".*q_proj": 4}}, ["rank_pattern", "regular expressions"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern.q_proj", "whole number"]),
        ({"alpha_pattern": {"q_proj": None}}, ["alpha_pattern.q_proj", "finite"]),
    ],
)
def test_a_config_that_cannot_be_applied_is_refused(
    make: AdapterMaker, base: BaseModel, change: dict[str, Any], words: list[str]
) -> None:
    message = _refusal(make(**change), base)
    assert "adapter_config.json" in message or "target_modules" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": True},
        {"eva_config": {"rho": 2.0}, "exclude_modules": ["k_proj"], "layers_to_transform": [0]},
        {"future_flag": False, "future_table": {}, "future_value": None},
        {"target_modules": "all-linear"},
        {"task_type": None},
        {"peft_version": "0.18.0", "qalora_group_size": 16, "inference_mode": True},
    ],
)
def test_keys_of_no_effect_are_accepted(make: AdapterMaker, base: BaseModel, change: dict[str, Any]) -> None:
    assert _inspect(make(**change), base).rank == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{PREFIX}.q_proj.lora_magnitude_vector", ["DoRA"]),
        (f"{PREFIX}.q_proj.lora_B.bias", ["biases"]),
        (f"{PREFIX}.q_proj.bias", ["biases"]),
        ("base_model.model.model.embed_tokens.weight", ["vocabulary"]),
        ("base_model.model.lm_head.weight", ["vocabulary"]),
        ("base_model.model.lm_head.lora_A.weight", ["vocabulary"]),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ["vocabulary"]),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", ["trained tokens"]),
        ("base_model.model.score.weight", ["modules_to_save"]),
        ("base_model.model.model.norm.weight", ["modules_to_save"]),
        ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", ["MoE experts"]),
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", ["MoE experts"]),
        (f"{PREFIX}.q_proj.lora_A.default.weight", ["unexpected tensor"]),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", ["unexpected tensor", "base_model.model."]),
        ("optimizer.state\n\x1b[31m", ["unexpected tensor", "\\n"]),
    ],
)
def test_a_tensor_that_is_no_plain_lora_matrix_is_refused(
    make: AdapterMaker, base: BaseModel, name: str, words: list[str]
) -> None:
    tensors = make.tensors() | {name: np.ones((4, 16), np.float32)}
    message = _refusal(make(tensors=tensors), base)
    for word in words:
        assert word in message


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({A: (5, 16)}, ["lora_A has rank 5 but lora_B has rank 4"]),
        ({A: (5, 16), B: (16, 5)}, ["rank 5", "adapter_config.json says 4"]),
        ({A: None}, ["has lora_B but no lora_A"]),
        ({B: None}, ["has lora_A but no lora_B"]),
        ({A: (0, 16), B: (16, 0)}, ["shape is [0, 16]", "matrix"]),
        ({A: (4, 4, 4)}, ["shape is [4, 4, 4]", "matrix"]),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    make: AdapterMaker,
    base: BaseModel,
    known: bool,
    changes: dict[str, tuple[int, ...] | None],
    words: list[str],
) -> None:
    tensors = make.tensors()
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = np.zeros(shape, np.float32)
    message = _refusal(make(tensors=tensors), base if known else None)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        ("model.layers.2.self_attn.q_proj", (16, 16), ["layers.2", "only 2 layers"]),
        ("model.layers.0.self_attn.qkv_proj", (16, 16), ["qkv_proj", "no such linear module"]),
        ("model.layers.1.self_attn.q_proj", (16, 24), ["16x24", "16x16"]),
        ("model.layers.1.self_attn.v_proj", (16, 16), ["16x16", "8x16"]),
    ],
)
def test_what_the_base_lacks_is_refused(
    make: AdapterMaker, base: BaseModel, module: str, shape: tuple[int, int], words: list[str]
) -> None:
    outputs, inputs = shape
    tensors = make.tensors() | {
        f"base_model.model.{module}.lora_A.weight": np.ones((4, inputs), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.ones((outputs, 4), np.float32),
    }
    folder = make(tensors=tensors, target_modules=["q_proj", "v_proj", "qkv_proj"])
    message = _refusal(folder, base)
    for word in [*words, "acme/base"]:
        assert word in message
    assert _inspect(folder, None).num_modules == 3


def test_a_rank_that_no_replica_allows_is_refused(make: AdapterMaker, base: BaseModel) -> None:
    folder = make(tensors=make.tensors(rank=16), r=16)
    assert "rank is 16; no replica allows more than 8" in _refusal(folder, base, max_lora_rank=8)
    assert _inspect(folder, base, max_lora_rank=16).rank == 16


def test_no_tensors_at_all_are_refused(make: AdapterMaker, base: BaseModel) -> None:
    assert "holds no tensors" in _refusal(make(tensors={}), base)


def test_too_many_bytes_are_refused(make: AdapterMaker, base: BaseModel) -> None:
    size_bytes = sum(tensor.nbytes for tensor in make.tensors().values())
    assert _inspect(make(), base, max_bytes=size_bytes).size_bytes == size_bytes
    assert f"at most {size_bytes - 1} are allowed" in _refusal(make(), base, max_bytes=size_bytes - 1)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32])
def test_other_dtypes_are_refused(make: AdapterMaker, base: BaseModel, dtype: type) -> None:
    tensors = make.tensors()
    tensors[B] = tensors[B].astype(dtype)
    assert "expected BF16, F16, F32" in _refusal(make(tensors=tensors), base)


def _raw_adapter(folder: Path, dtype: str, raw: bytes) -> None:
    """One q_proj whose lora_A and lora_B (rank 4, 16 wide) hold the same raw bytes."""
    entries = {
        A: {"dtype": dtype, "shape": [4, 16], "data_offsets": [0, len(raw)]},
        B: {"dtype": dtype, "shape": [16, 4], "data_offsets": [len(raw), 2 * len(raw)]},
    }
    header = json.dumps(entries).encode()
    data = struct.pack("<Q", len(header)) + header + raw + raw
    (folder / "adapter_model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("dtype", "finite", "bad"),
    [
        ("F32", "<f4 max", "0000c07f"),
        ("F32", "<f4 max", "000080ff"),
        ("F16", "ff7b", "007e"),
        ("F16", "ff7b", "00fc"),
        ("BF16", "7f7f", "c07f"),
        ("BF16", "7f7f", "80ff"),
    ],
)
def test_nan_and_infinity_are_refused_in_every_dtype(
    make: AdapterMaker, base: BaseModel, dtype: str, finite: str, bad: str
) -> None:
    largest = np.finfo("<f4").max.tobytes() if dtype == "F32" else bytes.fromhex(finite)
    folder = make()
    _raw_adapter(folder, dtype, largest * 64)
    assert _inspect(folder, base).dtypes == (dtype,)
    _raw_adapter(folder, dtype, largest * 63 + bytes.fromhex(bad))
    assert f"tensor '{A}' holds NaN or infinity" in _refusal(folder, base)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused(make: AdapterMaker, base: BaseModel, missing: str) -> None:
    folder = make()
    (folder / missing).unlink()
    assert f"{missing} is missing" in _refusal(folder, base)


def test_a_missing_folder_is_refused(tmp_path: Path, base: BaseModel) -> None:
    assert "no such folder" in _refusal(tmp_path / "nowhere", base)
    (tmp_path / "file").touch()
    assert "no such folder" in _refusal(tmp_path / "file", base)


@pytest.mark.parametrize("pickled", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_refused(make: AdapterMaker, base: BaseModel, pickled: str) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").rename(folder / pickled)
    message = _refusal(folder, base)
    assert pickled in message
    assert "pickled" in message


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4])
def test_truncated_weights_are_refused(make: AdapterMaker, base: BaseModel, keep: int) -> None:
    folder = make()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "truncated" in _refusal(folder, base)


def test_bytes_after_the_last_tensor_are_refused(make: AdapterMaker, base: BaseModel) -> None:
    folder = make()
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "4 bytes follow the last tensor" in _refusal(folder, base)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(make: AdapterMaker, base: BaseModel, raw: bytes) -> None:
    folder = make()
    (folder / "adapter_config.json").write_bytes(raw)
    assert "adapter_config.json is not" in _refusal(folder, base)


def test_an_oversized_config_is_refused(make: AdapterMaker, base: BaseModel) -> None:
    folder = make()
    (folder / "adapter_config.json").write_bytes(b" " * (1024**2 + 1))
    assert "adapter_config.json has 1048577 bytes" in _refusal(folder, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(make: AdapterMaker, base: BaseModel, name: str) -> None:
    folder, other = make(), make()
    (folder / name).unlink()
    (folder / name).symlink_to(other / name)
    assert f"{name} is a link out of the adapter's folder" in _refusal(folder, base)


def test_links_inside_the_folder_and_into_the_hub_cache_are_followed(
    make: AdapterMaker, base: BaseModel
) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").rename(folder / "weights")
    (folder / "adapter_model.safetensors").symlink_to("weights")
    assert _inspect(folder, base).rank == 4
    snapshot = make(name="models--a--b/snapshots/abc")
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (snapshot / "adapter_model.safetensors").rename(blobs / "123")
    (snapshot / "adapter_model.safetensors").symlink_to("../../blobs/123")
    assert _inspect(snapshot, base).rank == 4


def test_what_is_no_regular_file_is_refused(make: AdapterMaker, base: BaseModel) -> None:
    folder = make()
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    weights.mkdir()
    assert "not a regular file" in _refusal(folder, base)
    weights.rmdir()
    os.mkfifo(weights)
    assert "not a regular file" in _refusal(folder, base)
    weights.unlink()
    weights.symlink_to(weights.name)
    assert "cannot read adapter_model.safetensors" in _refusal(folder, base)
