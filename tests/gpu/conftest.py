"""Tests that need one NVIDIA GPU: they run as they are where there is one, and say why where they do not."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests; what vLLM, torch and Triton warn of is none of ours to mend."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def _missing() -> str:
    if not Path("/dev/nvidiactl").exists():
        return "this machine has no NVIDIA driver"
    for name in ("torch", "triton", "vllm"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: ./scripts/setup --cuda installs it"
    import torch

    return (
        ""
        if torch.cuda.is_available()
        else "torch finds no GPU: ./scripts/setup --cuda installs its CUDA build"
    )


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The GPU's name."""
    missing = _missing()
    if missing:
        pytest.skip(f"needs one NVIDIA GPU: {missing}")
    import torch

    return str(torch.cuda.get_device_name())
