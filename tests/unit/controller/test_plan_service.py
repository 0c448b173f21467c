"""Plans as an operator asks for them: through a router, over a cluster that works."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import MappingProxyType

import pytest

from loraserve.client import Client
from loraserve.errors import NotFoundError, StaleError
from loraserve.samples import SampleSet
from placement.cluster import messages
from placement.types import Holder, Placement, ReplicaId, VersionId
from tests.support.cli import run_cli
from tests.support.local_cluster import LocalCluster, local_cluster

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")
WAIT_S = 20.0


@pytest.fixture
async def cluster(tmp_path: Path, samples: SampleSet) -> AsyncIterator[LocalCluster]:
    async with local_cluster(tmp_path, samples) as one:
        yield one


def everything_on(plan: Placement, replica: ReplicaId) -> Placement:
    holders = (Holder(replica_id=replica, share=1.0),)
    return Placement(MappingProxyType(dict.fromkeys(sorted(plan.holders), holders)))


async def test_plans_are_shown_applied_and_rolled_back(cluster: LocalCluster) -> None:
    async with Client(cluster.address) as client:
        status = await client.plan(propose=True)
        first = status.current
        assert (status.frozen, status.earlier, status.refusal) == (False, (), "")
        assert status.proposed == first
        assert status.diff is not None
        assert status.diff.is_empty
        with pytest.raises(StaleError, match="no plan before this one"):
            await client.roll_back_plan()

        wanted = everything_on(first, R1)
        change = await client.apply_plan(wanted)
        assert change.frozen
        moved = change.diff.replicas[0]
        assert moved.replica_id == R0
        assert set(moved.dropped) == set(first.holders)
        state = cluster.controller.state
        await cluster.controller.wait_until(lambda: not state.replicas[R0].copies, WAIT_S)
        cluster.controller.dispatch(messages.EpochElapsed())
        assert (await client.plan()).current == wanted, "an epoch does not undo it"
        assert (await client.status()).plan_frozen

        assert (await client.roll_back_plan()).frozen
        assert (await client.plan()).current == first
        assert not (await client.freeze_plan(frozen=False)).frozen
        assert not (await client.apply_plan()).frozen


async def test_a_plan_that_may_not_be_is_refused_and_nothing_is_changed(cluster: LocalCluster) -> None:
    async with Client(cluster.address) as client:
        before = (await client.plan()).current
        some = Placement(MappingProxyType(dict(list(before.holders.items())[:1])))
        unknown = Placement(MappingProxyType({VersionId("x@0"): next(iter(before.holders.values()))}))
        for bad, kind, reason in (
            (some, StaleError, "the plan is refused: it drops the last copy of"),
            (
                everything_on(before, ReplicaId("replica-9")),
                NotFoundError,
                "replica-9, which is no replica here;",
            ),
            (unknown, NotFoundError, "the plan names x@0, whose adapter is not registered"),
        ):
            with pytest.raises(kind, match=reason):
                await client.apply_plan(bad)
        after = await client.plan()
        assert (after.current, after.frozen, after.earlier) == (before, False, ())


async def test_the_commands_save_apply_and_roll_back(cluster: LocalCluster, tmp_path: Path) -> None:
    where = ("--address", cluster.address)
    saved, wanted = tmp_path / "plan.json", tmp_path / "wanted.json"
    ran = await run_cli("plan", "show", "--save", str(saved), "--json", *where)
    assert ran.exit_code == 0, ran.stderr
    assert ran.json()["current"] == json.loads(saved.read_text())
    tree = json.loads(saved.read_text())
    tree["holders"] = {version: {"replica-0": 1.0} for version in tree["holders"]}
    wanted.write_text(json.dumps(tree))
    ran = await run_cli("plan", "apply", str(wanted), *where)
    assert ran.exit_code == 0, ran.stderr
    assert "replica-1" in ran.stdout
    assert "the plan is frozen" in ran.stdout
    ran = await run_cli("plan", "rollback", "--json", *where)
    assert ran.exit_code == 0, ran.stderr
    assert ran.json()["frozen"]
    wanted.write_text(json.dumps(tree).replace("replica-0", "replica-9"))
    ran = await run_cli("plan", "apply", str(wanted), *where)
    assert ran.exit_code == 2
    assert ran.stderr.count("\n") == 1
    wanted.write_text('{"holders": []}')
    ran = await run_cli("plan", "apply", str(wanted), *where)
    assert ran.exit_code == 2
    assert ran.stderr.startswith(f"error: {wanted}: not a plan: holders: expected a JSON object; ")
    ran = await run_cli("top", "--once", *where)
    assert ran.exit_code == 0, ran.stderr
    assert "plan frozen" in ran.stdout
    assert "skew 1.00 = 1.00 (load) x 1.00 (rank)" in ran.stdout
