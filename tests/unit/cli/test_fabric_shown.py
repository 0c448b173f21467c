"""What people and programs are shown of where adapters came from."""

from pathlib import Path
from typing import Any

from loraserve.cli.tables import fabric_line
from loraserve.client import Client
from loraserve.client_types import FabricSource, FabricStatus
from loraserve.cluster.local_fleet import local_fabric
from loraserve.samples import SampleSet
from placement.types import ReplicaId
from tests.support.cli import run_cli
from tests.support.controller_kit import TIMEOUT_S
from tests.support.fabric_cluster import is_carried_out, plan_of
from tests.support.local_cluster import LocalCluster, local_cluster

ONE, TWO = ReplicaId("replica-0"), ReplicaId("replica-1")
MIB = 2**20


class Shown:
    """A replica of a status, as far as the line reads it."""

    def __init__(self, **loads: int) -> None:
        self.sources = tuple(
            FabricSource(source=source, loads=number, bytes=number * MIB, seconds=1.0)
            for source, number in loads.items()
        )
        self.fabric = FabricStatus(sources=self.sources)


def with_troubles(failures: dict[str, int], *breakers: str) -> Shown:
    shown = Shown(tcp=1)
    shown.fabric = FabricStatus(sources=shown.sources, failures=failures, open_breakers=breakers)
    return shown


def test_without_a_load_there_is_no_line() -> None:
    assert fabric_line([]) == ""
    assert fabric_line([Shown(), Shown()]) == ""


def test_the_loads_of_all_replicas_are_added_up_by_where_they_came_from() -> None:
    assert fabric_line([Shown(origin=2, tcp=1), Shown(cache=1), Shown(tcp=2, ucx=4)]) == (
        "adapters loaded from: their own cache 1 (1.0 MiB), the controller's store 2 (2.0 MiB),"
        " peers over tcp 3 (3.0 MiB), peers over ucx 4 (4.0 MiB)"
    )


def test_failed_attempts_and_what_is_left_alone_follow() -> None:
    troubled = [with_troubles({"gone": 2}, "ucx"), with_troubles({"gone": 1, "corrupt": 1}, "a/tcp", "ucx")]
    assert fabric_line(troubled) == (
        "adapters loaded from: peers over tcp 2 (2.0 MiB); failed attempts: corrupt 1, gone 3;"
        " not tried at the moment: a/tcp, ucx"
    )


def test_what_has_only_failed_is_told_too() -> None:
    """Most of all then."""
    failed = Shown()
    failed.fabric = FabricStatus(failures={"no source": 2}, open_breakers=("a/tcp",))
    assert fabric_line([failed, Shown()]) == ("failed attempts: no source 2; not tried at the moment: a/tcp")


async def test_status_tells_programs_and_people_where_adapters_came_from(
    tmp_path: Path, samples: SampleSet
) -> None:
    sections = {"fabric": {"transports": ["tcp"]}}
    async with local_cluster(tmp_path, samples, sections=sections, make_fabric=local_fabric) as cluster:
        versions = sorted(cluster.controller.state.adapters)
        async with Client(cluster.address) as client:
            for where in ({ONE}, {TWO}, {ONE, TWO}):
                wanted = dict.fromkeys(versions, where)
                await client.apply_plan(plan_of(wanted))
                await cluster.controller.wait_until(
                    lambda: is_carried_out(cluster.controller, wanted),  # noqa: B023
                    TIMEOUT_S,
                )
        ran = await run_cli("status", "--address", cluster.address, "--json")
        shown = ran.json()["replicas"]
        assert [told(one) for one in shown] == [counted(cluster, one["replica_id"]) for one in shown]
        sources = [source for one in shown for source in one["fabric"]["sources"]]
        assert sum(one["loads"] for one in sources if one["source"] == "origin") == len(versions)
        assert {"tcp", "cache"} <= {one["source"] for one in sources}
        assert all(one["bytes"] > 0 for one in sources)
        ran = await run_cli("status", "--address", cluster.address)
        lines = [line for line in ran.stdout.splitlines() if line.startswith("adapters loaded from: ")]
        assert len(lines) == 1
        assert f"the controller's store {len(versions)} (" in lines[0]


def told(replica: Any) -> dict[str, Any]:
    fabric = replica["fabric"]
    return {
        "loads": {one["source"]: one["loads"] for one in fabric["sources"]},
        "bytes": {one["source"]: one["bytes"] for one in fabric["sources"]},
        **{name: fabric[name] for name in ("failures", "cached_bytes", "open_breakers")},
    }


def counted(cluster: LocalCluster, replica: str) -> dict[str, Any]:
    fabric = cluster.fleet.links[ReplicaId(replica)].server.fabric
    assert fabric is not None
    counts = fabric.counts()
    return {
        "loads": dict(counts.loads),
        "bytes": dict(counts.bytes),
        "failures": {},
        "cached_bytes": counts.cached_bytes,
        "open_breakers": [],
    }
