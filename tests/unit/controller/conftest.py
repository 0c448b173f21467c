"""Fixtures of controller tests: each ends with a check of the state machine and of every replica."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from loraserve.clock import WallClock
from loraserve.cluster.local_fleet import MakeFabric, local_fabric
from loraserve.config import Config
from loraserve.engines.base import Engine
from loraserve.samples import SampleSet
from placement.cluster.invariants import check_cluster
from placement.profile import Profile
from placement.types import ReplicaId
from tests.support.controller_kit import RefusingEngine, Setup, small_config
from tests.support.fabric_kit import Town, a_town


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    """Fabrics that a test can reach into; ask for it before `setup`, whose replicas have them."""
    async with a_town() as town:
        yield town


@pytest.fixture
async def setup(tmp_path: Path, samples: SampleSet) -> AsyncIterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def make(
        *,
        refused_rank: int = 0,
        profile: Profile | None = None,
        with_fabric: bool = False,
        make_fabric: MakeFabric | None = None,
        **options: object,
    ) -> Setup:
        config = small_config(samples.model, **options)  # type: ignore[arg-type]

        def engine(replica: ReplicaId, config: Config) -> Engine:
            one = RefusingEngine(config.engine, config.emulated, config.model, clock=WallClock())
            one.refused_rank = refused_rank
            return one

        folder = tmp_path / str(len(made))
        fabric = local_fabric if with_fabric else make_fabric
        made.append(Setup(folder, config, engine, profile=profile, make_fabric=fabric))
        return made[-1]

    yield make
    for one in made:
        check_cluster(one.controller.state)
        await one.close()
