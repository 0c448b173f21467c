"""A vLLM release that nobody tested runs with vLLM's own LoRA execution, and the log says why."""

import logging
from pathlib import Path

import pytest

from loraserve.config import EngineSection, LoraExecution
from loraserve.engines import vllm_arguments
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm_arguments import few_rows_library, lora_execution
from loraserve.engines.vllm_lora.support import TESTED, untested
from loraserve.engines.vllm_slots import AdapterSlots
from loraserve.errors import AdapterRejectedError
from placement.types import VersionId
from tests.support.adapter_maker import one_line


@pytest.mark.parametrize("version", ["", "0.28.0", "0.29.0rc1", "0.30.0"])
def test_a_release_that_was_not_tested_is_named_with_those_that_were(version: str) -> None:
    reason = untested(version)
    assert reason.startswith(f"vLLM {version or 'of unknown version'}: ")
    assert "0.29.0" in reason
    assert one_line(ValueError(reason)) == reason
    assert not any(untested(one) for one in TESTED)


@pytest.mark.parametrize("configured", ["rank-true", "padded", "stock", "off"])
@pytest.mark.parametrize("version", ["0.29.0", "0.30.0"])
def test_an_untested_release_computes_adapters_itself(
    configured: LoraExecution,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(vllm_arguments, "vllm_version", lambda: version)
    with caplog.at_level(logging.WARNING, "loraserve"):
        execution = lora_execution(EngineSection(lora_execution=configured))
    falls_back = version == "0.30.0" and configured in ("rank-true", "padded")
    assert execution == ("stock" if falls_back else configured)
    assert caplog.messages == ([untested(version)] if falls_back else [])


def test_without_a_compiler_the_engine_starts_without_the_kernel_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING, "loraserve"):
        assert few_rows_library() == ""
    (line,) = caplog.messages
    assert "there is no C compiler (cc)" in line


async def test_an_engine_without_lora_refuses_every_adapter_in_one_line(tmp_path: Path) -> None:
    held = EngineSection(adapter_slots=4).held_with("off")
    slots = AdapterSlots(None, num_slots=held, max_lora_rank=64)
    adapter = AdapterFiles(version_id=VersionId("one@0"), directory=tmp_path, rank=8, size_bytes=1)
    with pytest.raises(
        AdapterRejectedError, match=r"adapter one@0: engine\.lora_execution is off"
    ) as refusal:
        await slots.load(adapter)
    one_line(refusal.value)
    assert slots.pin(VersionId("one@0")) is None
    assert await slots.resident() == frozenset()
    await slots.unload(VersionId("one@0"))
