"""Fixtures that end every replica test with a check of its accounts."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.support.replica_bench import MakeBench, ReplicaBench, replica_bench


@pytest.fixture
async def make_bench() -> AsyncIterator[MakeBench]:
    """Builds replicas of any configuration."""
    async with AsyncExitStack() as stack:

        async def make(**sections: dict[str, Any]) -> ReplicaBench:
            return await stack.enter_async_context(replica_bench(**sections))

        yield make


@pytest.fixture
async def bench(make_bench: MakeBench) -> ReplicaBench:
    """A replica with two slots and 10,000 bytes."""
    return await make_bench()
