"""Patterns of ranks and alphas: folded so that one r and one alpha give exactly the configured change."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from loraserve.adapters import AdapterStore, BaseModel, StoreLimits, inspect_adapter
from loraserve.errors import AdapterRejectedError
from tests.support.adapter_maker import PREFIX, AdapterMaker, small_base

LIMITS = StoreLimits(max_lora_rank=64)


def _tensors(ranks: dict[str, int], dtype: type = np.float32) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {}
    for module, outputs in (("q_proj", 16), ("v_proj", 8)):
        for side, shape in (("A", (ranks[module], 16)), ("B", (outputs, ranks[module]))):
            tensors[f"{PREFIX}.{module}.lora_{side}.weight"] = rng.standard_normal(shape).astype(dtype)
    return tensors


def _engine_change(folder: Path, module: str) -> NDArray[np.float64]:
    """What an engine adds to a module's matrix: one r, one alpha, patterns ignored."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    lora_a, lora_b = (tensors[f"{PREFIX}.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    change: NDArray[np.float64] = config["lora_alpha"] / divisor * (lora_b @ lora_a)
    return change


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    ranks=st.fixed_dictionaries({"q_proj": st.integers(1, 12), "v_proj": st.integers(1, 12)}),
    alphas=st.fixed_dictionaries({"q_proj": st.integers(-40, 40), "v_proj": st.integers(1, 40)}),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_an_engine_applies_each_modules_own_scaling(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: dict[str, int],
    alphas: dict[str, int],
    use_rslora: bool,
    dtype: type,
) -> None:
    root = tmp_path_factory.mktemp("fold")
    tensors = _tensors(ranks, dtype)
    source = AdapterMaker(root)(
        tensors=tensors,
        r=5,
        lora_alpha=7,
        use_rslora=use_rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    store = AdapterStore(root / "store", base=small_base(), limits=LIMITS)
    stored = store.add("a", str(source))
    assert stored.manifest.rank == max(ranks.values())
    assert not stored.manifest.needs_folding
    assert store.add("again", str(source)).manifest.sha256 == stored.manifest.sha256
    for module in ranks:
        lora_a, lora_b = (
            tensors[f"{PREFIX}.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB"
        )
        divisor = math.sqrt(ranks[module]) if use_rslora else ranks[module]
        expected = alphas[module] / divisor * (lora_b @ lora_a)
        tolerance = 3 * 2.0**-24 * np.abs(alphas[module] / divisor) * (np.abs(lora_b) @ np.abs(lora_a))
        assert (np.abs(_engine_change(stored.directory, module) - expected) <= tolerance + 1e-12).all()


def test_patterns_that_change_nothing_are_stored_as_they_are(make: AdapterMaker, tmp_path: Path) -> None:
    source = make(rank_pattern={"q_proj": 4, "other": 9}, alpha_pattern={})
    stored = AdapterStore(tmp_path / "store", base=small_base(), limits=LIMITS).add("a", str(source))
    assert (stored.directory / "adapter_config.json").read_bytes() == (
        source / "adapter_config.json"
    ).read_bytes()


def test_bf16_is_folded_in_float32(make: AdapterMaker, tmp_path: Path, base: BaseModel) -> None:
    source = make(alpha_pattern={"^model.layers.0.self_attn.q_proj": 3})
    weights = source / "adapter_model.safetensors"
    tensors = load_file(weights)
    # numpy has no BF16: write the file by hand, with the upper half of each float32.
    entries, data = {}, b""
    for name, tensor in tensors.items():
        half = (tensor.view("<u4") >> 16).astype("<u2").tobytes()
        offsets = [len(data), len(data) + len(half)]
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        data += half
    header = json.dumps(entries).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + data)
    stored = AdapterStore(tmp_path / "store", base=base, limits=LIMITS).add("a", str(source))
    assert stored.manifest.dtypes == ("BF16", "F32")
    name = f"{PREFIX}.q_proj.lora_B.weight"
    truncated = (tensors[name].view("<u4") & 0xFFFF0000).view("<f4")
    folded = _tensor(stored.directory / "adapter_model.safetensors", name)
    np.testing.assert_array_equal(folded, truncated * np.float32(3 / 4))


def _tensor(path: Path, name: str) -> NDArray[np.float32]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    begin, end = entry["data_offsets"]
    assert entry["dtype"] == "F32"
    return np.frombuffer(raw[8 + length + begin : 8 + length + end], "<f4").reshape(entry["shape"])


def test_a_scaling_that_overflows_is_refused(make: AdapterMaker, tmp_path: Path) -> None:
    tensors = make.tensors()
    tensors[f"{PREFIX}.q_proj.lora_B.weight"][0, 0] = 3e38
    source = make(tensors=tensors, alpha_pattern={"q_proj": 800})
    store = AdapterStore(tmp_path / "store", base=small_base(), limits=LIMITS)
    with pytest.raises(AdapterRejectedError, match="NaN or infinity"):
        store.add("a", str(source))
    assert list((tmp_path / "store").iterdir()) == []


def test_a_pattern_matches_whole_names_only(make: AdapterMaker, base: BaseModel) -> None:
    folder = make(rank_pattern={"proj": 9, "^q_proj": 9, "attn.q_proj": 9})
    assert inspect_adapter(folder, base=base, max_lora_rank=64).rank == 4


def test_the_rank_that_a_pattern_raises_counts(make: AdapterMaker, base: BaseModel) -> None:
    folder = make(tensors=_tensors({"q_proj": 12, "v_proj": 4}), rank_pattern={"q_proj": 12})
    manifest = inspect_adapter(folder, base=base, max_lora_rank=64)
    assert (manifest.rank, manifest.needs_folding) == (12, True)
    with pytest.raises(AdapterRejectedError, match="rank is 12"):
        inspect_adapter(folder, base=base, max_lora_rank=8)
