"""Fixtures of the fabric's tests."""

from collections.abc import AsyncIterator

import pytest

from tests.support.fabric_kit import Library, Town, a_town


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Adapters as the control plane knows them."""
    return Library(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    """Fabrics that reach each other; nothing of them may be left at the end."""
    async with a_town() as town:
        yield town
