"""The sample set: complete, reproducible, and in the layouts that everyone reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from loraserve.errors import BadInputError
from loraserve.samples import LLAMA_MODULES, SampleSet, build_adapter, build_checkpoint, build_samples
from loraserve.samples.__main__ import main


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    return build_samples(tmp_path_factory.mktemp("samples") / "set")


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_one_adapter_for_each_rank(samples: SampleSet) -> None:
    assert list(samples.adapters) == ["rank-8", "rank-16", "rank-32", "rank-64", "rank-128"]
    for name, directory in samples.adapters.items():
        rank = int(name.removeprefix("rank-"))
        tensors = load_file(directory / "adapter_model.safetensors")
        assert json.loads((directory / "adapter_config.json").read_text())["r"] == rank
        assert len(tensors) == 2 * 2 * len(LLAMA_MODULES)
        assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {rank}
        assert {tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key} == {rank}
        assert all(np.abs(tensor).max() > 0 for tensor in tensors.values())


def test_adapter_changes_fit_the_checkpoint(samples: SampleSet) -> None:
    weights = load_file(samples.model / "model.safetensors")
    tensors = load_file(samples.adapters["rank-16"] / "adapter_model.safetensors")
    for key in (key for key in tensors if "lora_A" in key):
        change = 2.0 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        weight = weights[key.removeprefix("base_model.model.").replace(".lora_A", "")]
        assert change.shape == weight.shape
        assert 0.2 < change.std() / weight.std() < 1.5


def test_the_tokenizer_round_trips_any_text(samples: SampleSet) -> None:
    tokenizer = Tokenizer.from_file(str(samples.model / "tokenizer.json"))
    config = json.loads((samples.model / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 1024
    for text in ("The harbour wakes", "Grüße, 世界 🙂\n\t{x: 1}"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == config["bos_token_id"]
        assert tokenizer.decode(ids) == text


def test_the_same_seed_gives_the_same_bytes(samples: SampleSet, tmp_path: Path) -> None:
    again = build_samples(tmp_path / "again")
    assert _contents(again.model.parent) == _contents(samples.model.parent)


def test_another_seed_gives_other_weights(samples: SampleSet, tmp_path: Path) -> None:
    other = build_checkpoint(tmp_path / "other", seed=1)
    assert (other / "tokenizer.json").read_bytes() == (samples.model / "tokenizer.json").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (samples.model / "model.safetensors").read_bytes()


def test_a_current_set_is_left_alone_and_a_damaged_one_is_rebuilt(tmp_path: Path) -> None:
    built = build_samples(tmp_path / "set", ranks=(8,))
    weights = built.adapters["rank-8"] / "adapter_model.safetensors"
    before, stamp = weights.stat().st_ino, weights.read_bytes()
    build_samples(tmp_path / "set", ranks=(8,))
    assert weights.stat().st_ino == before
    weights.write_bytes(stamp[:-1])
    build_samples(tmp_path / "set", ranks=(8,))
    assert weights.read_bytes() == stamp


def test_another_recipe_replaces_the_set_and_leaves_nothing_behind(tmp_path: Path) -> None:
    build_samples(tmp_path / "set", ranks=(8, 16))
    build_samples(tmp_path / "set", ranks=(16,))
    assert [path.name for path in (tmp_path / "set" / "adapters").iterdir()] == ["rank-16"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInputError, match="holds other files"):
        build_samples(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_subset_of_modules_and_rslora(samples: SampleSet, tmp_path: Path) -> None:
    adapter = build_adapter(
        tmp_path / "a", samples.model, rank=4, seed=3, target_modules=("q_proj", "down_proj"), use_rslora=True
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert config["target_modules"] == ["down_proj", "q_proj"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in tensors} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "seed": 0}, "rank is 0"),
        ({"rank": 8, "seed": 0, "target_modules": ("nope",)}, "nope"),
    ],
)
def test_a_wrong_adapter_recipe_is_refused(
    samples: SampleSet, tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        build_adapter(tmp_path / "a", samples.model, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden_size", [0, 100, 192, 8320])
def test_a_wrong_checkpoint_recipe_is_refused(tmp_path: Path, hidden_size: int) -> None:
    with pytest.raises(BadInputError, match=f"hidden_size is {hidden_size}; expected a multiple of 128"):
        build_checkpoint(tmp_path / "m", hidden_size=hidden_size)


def test_a_checkpoint_may_be_wider_than_the_sample(tmp_path: Path) -> None:
    weights = load_file(build_checkpoint(tmp_path / "m", hidden_size=384, num_layers=3) / "model.safetensors")
    assert weights["model.layers.2.self_attn.q_proj.weight"].shape == (384, 384)
    assert weights["model.layers.2.mlp.down_proj.weight"].shape == (384, 768)


def test_the_command_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "set"), "--ranks", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["model"], "config.json").is_file()
    assert list(told["adapters"]) == ["rank-8"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    assert main([str(tmp_path / "other")]) == 2
    assert "holds other files" in capsys.readouterr().err
