"""Fixtures of the fabric's tests."""

import gc
from collections.abc import AsyncIterator

import pytest

from tests.support.fabric_kit import Library, Town


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Adapters as the control plane knows them."""
    return Library(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    """Fabrics that reach each other; nothing of them may be left at the end."""
    town = Town()
    yield town
    # A failed test's traceback may keep its segments.
    gc.collect()
    await town.close()
