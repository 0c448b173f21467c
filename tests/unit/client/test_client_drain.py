"""Deadlines of drains that are none."""

from pathlib import Path

import pytest

from loraserve.client import Client
from loraserve.controller import drains
from loraserve.errors import BadInputError
from loraserve.samples import SampleSet
from placement.cluster.records import DrainOrder
from placement.types import ReplicaId
from tests.support.cli import run_cli
from tests.support.local_cluster import local_cluster

# Nobody listens there, and nobody is asked.
NOWHERE = "127.0.0.1:1"
NO_DEADLINES = ["nan", "inf", "1e300", "-1", "86400.5"]


@pytest.mark.parametrize("deadline", NO_DEADLINES)
async def test_a_deadline_that_is_none_is_refused_before_a_router_is_asked(deadline: str) -> None:
    ran = await run_cli("drain", "replica-0", "--address", NOWHERE, "--deadline", deadline)
    assert ran.exit_code == 2
    assert ran.stderr == f"error: deadline_s: {float(deadline):g}; expected seconds from 0 to 86400\n"


async def test_client_and_controller_draw_the_line_at_the_same_place(
    tmp_path: Path, samples: SampleSet
) -> None:
    async with local_cluster(tmp_path, samples) as cluster, Client(NOWHERE) as client:
        for deadline in NO_DEADLINES:
            with pytest.raises(BadInputError) as by_client:
                client.drain(["replica-0"], deadline_s=float(deadline))
            order = DrainOrder(deadline_s=float(deadline))
            with pytest.raises(BadInputError) as by_controller:
                drains.begin_drain(cluster.controller, [ReplicaId("replica-0")], order)
            assert str(by_client.value) == str(by_controller.value)
