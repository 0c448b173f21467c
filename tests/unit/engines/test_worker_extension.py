"""What LoRAServe's methods say in a worker where vLLM made its own LoRA manager."""

from types import SimpleNamespace

import pytest

from loraserve.engines.vllm_lora.worker import WorkerExtension


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("loraserve_open", (1, 2, 3, 4, "00", False)),
        ("loraserve_advance", (1, True, False)),
        ("loraserve_deactivate", (1,)),
        ("loraserve_report", ()),
    ],
)
def test_an_install_without_our_plugin_is_named(method: str, arguments: tuple[object, ...]) -> None:
    """As an editable install from before the entry point had its present name."""
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(lora_manager=object())
    with pytest.raises(RuntimeError, match=r"^vLLM made its own object: .*install loraserve again$"):
        getattr(worker, method)(*arguments)
