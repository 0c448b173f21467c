"""Fixtures that several areas share."""

from pathlib import Path

import pytest
from hypothesis import settings

from loraserve.samples import SampleSet, build_samples

# Earlier names weigh more; the sort is stable, so that tests that share a fixture stay together.
SLOW_LAST = ("gpu", "vllm", "ray", "slow")

# How long an example takes says how busy the machine is. The same examples every time: a failure is one
# that everybody sees. New ones are looked for with `scripts/test --hypothesis-profile search`.
settings.register_profile("loraserve", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("loraserve")


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    """The sample checkpoint and its five adapters."""
    return build_samples(tmp_path_factory.mktemp("samples") / "set")


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    """The real traces beside the checkout, or a skip that says so."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip("no ../shared/traces beside the checkout")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast tests first: a plain mistake shows in seconds, before engines and clusters start."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in SLOW_LAST])
