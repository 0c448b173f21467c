"""Weights and targets of adapters: set by operators, kept, planned with, and counted against."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from loraserve.client import Client
from loraserve.controller import keeper
from loraserve.controller.controller import Controller
from loraserve.controller.store import Changes, Store, StoredRegistration
from loraserve.controller.terms import set_terms
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import Fetched
from loraserve.errors import BadInputError, NotFoundError
from loraserve.fabric.wanted import PeerAddress
from loraserve.request import SamplingParams
from loraserve.rpc.v1 import management_pb2
from loraserve.samples import SampleSet
from placement.profile import Slo
from placement.types import AdapterName, AdapterTerms, AdapterVersion, VersionId
from tests.support.cli import finish_cli, run_cli, start_cli
from tests.support.controller_kit import Setup
from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.router_bench import until

A, B = AdapterName("a"), AdapterName("b")
TIGHT = AdapterTerms(weight=2.5, slo=Slo(ttft_ms=1.0, tbt_ms=50.0))
TWO = SamplingParams(max_tokens=2)
LOOSE = {"slo": {"ttft_ms": 20_000.0, "tbt_ms": 15_000.0}}
"""Targets that a busy machine meets too."""


@pytest.fixture
async def cluster(tmp_path: Path, samples: SampleSet) -> AsyncIterator[LocalCluster]:
    async with local_cluster(tmp_path, samples, sections=LOOSE) as one:
        yield one


def registration(name: AdapterName, digit: str) -> StoredRegistration:
    adapter = AdapterVersion(
        version_id=VersionId(f"{name}@{digit}"), name=name, sha256=digit, rank=8, size_bytes=1
    )
    return StoredRegistration(adapter=adapter, source="/a", target_modules=("q_proj",))


def test_terms_are_kept_as_long_as_their_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "controller.sqlite")
    versions = {}
    for name, digit in ((A, "1"), (A, "2"), (B, "3")):
        store.save_adapter(registration(name, digit))
        versions[digit] = registration(name, digit).adapter.version_id
    plain = AdapterTerms(weight=3.0)
    store.write(Changes(terms={A: TIGHT, B: plain}))
    store.write(Changes(deleted={versions["1"]}))
    store.close()
    again = Store(tmp_path / "controller.sqlite")
    assert again.terms() == {A: TIGHT, B: plain}
    again.write(Changes(deleted={versions["2"]}))
    assert again.terms() == {B: plain}
    again.write(Changes(terms={B: TIGHT}))
    assert again.terms() == {B: TIGHT}
    again.close()


def wanted(name: str, **terms: float) -> management_pb2.SetAdapterRequest:
    return management_pb2.SetAdapterRequest(name=name, terms=management_pb2.AdapterTerms(**terms))


async def test_a_controller_that_comes_back_plans_with_the_same_terms(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made = setup()
    controller: Controller = await made.start()
    for name, source in list(samples.adapters.items())[:2]:
        await controller.register(name, str(source), replace=False)
    first, second = sorted(controller.state.active)
    set_terms(controller, wanted(first, weight=2.0, slo_ttft_ms=700.0))
    set_terms(controller, wanted(first, slo_tbt_ms=40.0))
    set_terms(controller, wanted(second, weight=4.0))
    terms = {
        first: AdapterTerms(weight=2.0, slo=Slo(ttft_ms=700.0, tbt_ms=40.0)),
        second: AdapterTerms(weight=4.0),
    }
    assert controller.state.terms == terms
    controller = await made.restart()
    assert controller.state.terms == terms
    version = controller.state.active[first]
    snapshot = controller.state.snapshot()
    assert (snapshot.weights[version], snapshot.slos) == (2.0, {version: terms[first].slo})
    # 0 is what the cluster has.
    set_terms(controller, wanted(first, slo_ttft_ms=0.0, slo_tbt_ms=0.0))
    assert controller.state.terms[first] == AdapterTerms(weight=2.0)
    controller.remove(first)
    assert first not in controller.state.terms
    with pytest.raises(NotFoundError, match="is not registered"):
        set_terms(controller, wanted(first, weight=1.0))


class SlowLoads:
    """Replicas whose loads wait until they may go on."""

    def __init__(self, made: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = asyncio.Event()
        self.num_begun = 0
        self.servers = [link.server for link in made.fleet.links.values()]
        for server in self.servers:
            monkeypatch.setattr(server, "load_adapter", self._late(server.load_adapter))

    def _late(
        self, load: Callable[..., Coroutine[Any, Any, Fetched | None]]
    ) -> Callable[..., Coroutine[Any, Any, Fetched | None]]:
        async def late(files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
            self.num_begun += 1
            await self.may_go_on.wait()
            return await load(files, peers)

        return late


async def test_targets_that_change_during_a_load_are_told_after_it(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup()
    controller: Controller = await made.start()
    slow = SlowLoads(made, monkeypatch)
    registering = asyncio.ensure_future(
        controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    )
    await until(lambda: slow.num_begun == len(slow.servers))
    set_terms(controller, wanted("a", slo_ttft_ms=700.0))
    slow.may_go_on.set()
    version = await registering
    await until(lambda: all(one.service.slo(version).ttft_ms == 700.0 for one in slow.servers))


async def test_a_replica_that_does_not_take_new_targets_in_time_keeps_its_copy(
    setup: Callable[..., Setup],
    samples: SampleSet,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = setup()
    controller: Controller = await made.start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    slow = SlowLoads(made, monkeypatch)
    await until(lambda: len(controller.state.holders(version)) == len(slow.servers))
    monkeypatch.setattr(keeper, "LOAD_TIMEOUT_S", 0.01)
    set_terms(controller, wanted("a", slo_ttft_ms=700.0))
    await until(lambda: caplog.text.count("has not heard of the targets of a") == len(slow.servers))
    assert all(version in server.pool.resident() for server in slow.servers)
    slow.may_go_on.set()
    await until(lambda: all(one.service.slo(version).ttft_ms == 700.0 for one in slow.servers))


@pytest.mark.parametrize(
    ("terms", "line"),
    [
        ({"weight": 0.0}, r"terms.weight: 0; expected a number above 0, at most 1e\+06"),
        ({"weight": float("nan")}, "terms.weight: nan; expected a number above 0"),
        ({"slo_ttft_ms": -1.0}, "terms.ttft_ms"),
        ({"slo_tbt_ms": float("inf")}, "terms.tbt_ms"),
    ],
)
async def test_terms_that_cannot_be_change_nothing(
    cluster: LocalCluster, samples: SampleSet, terms: dict[str, float], line: str
) -> None:
    name = sorted(samples.adapters)[0]
    before = dict(cluster.controller.state.terms)
    with pytest.raises(BadInputError, match=line):
        set_terms(cluster.controller, wanted(name, **terms))
    async with Client(cluster.address) as client:
        with pytest.raises(BadInputError, match=line):
            await client.register_adapter("more", str(samples.adapters[name]), **terms)  # type: ignore[arg-type]
    assert cluster.controller.state.terms == before
    assert AdapterName("more") not in cluster.controller.state.active


async def test_attainment_is_counted_against_an_adapters_own_targets(
    cluster: LocalCluster, samples: SampleSet
) -> None:
    name = sorted(samples.adapters)[0]
    async with Client(cluster.address) as client:
        await client.complete("hello", adapter=name, sampling=TWO)
        info = await client.set_adapter(name, slo_ttft_ms=1e-3)
        assert (info.slo_ttft_ms, info.slo_tbt_ms, info.has_own_slo) == (1e-3, 15_000.0, True)
        version = cluster.controller.state.active[AdapterName(name)]
        counts = [link.server.service for link in cluster.fleet.links.values()]
        await until(lambda: all(one.slo(version).ttft_ms == 1e-3 for one in counts))
        await client.complete("hello", adapter=name, sampling=TWO)
        (mine,) = [one for one in (await client.status()).adapters if one.name == name]
        assert (mine.requests, mine.in_slo) == (2, 1)
        kept = await client.register_adapter(name, str(samples.adapters[name]), replace=True)
        assert kept.has_own_slo


async def test_the_command_line_sets_and_shows_them(cluster: LocalCluster, samples: SampleSet) -> None:
    where = ("--address", cluster.address)
    name = sorted(samples.adapters)[0]
    source = str(samples.adapters[name])
    ran = await run_cli(
        "adapter", "add", "extra", source, "--weight", "3", "--slo-ttft-ms", "900", "--json", *where
    )
    assert ran.exit_code == 0, ran.stderr
    assert (ran.json()["weight"], ran.json()["slo_ttft_ms"], ran.json()["has_own_slo"]) == (3.0, 900.0, True)
    ran = await run_cli("adapter", "set", "extra", "--weight", "1.5", "--slo-ttft-ms", "0", *where)
    assert ran.stdout == "extra: weight 1.5, TTFT 20000 ms, TBT 15000 ms, as usual\n"
    ran = await run_cli("adapter", "set", "extra", *where)
    assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1)
    ran = await run_cli("status", *where)
    header, row = (
        next(line for line in ran.stdout.splitlines() if line.startswith(start))
        for start in ("adapter ", "extra ")
    )
    assert header.split()[:8] == ["adapter", "rank", "MiB", "version", "weight", "tok/s", "forecast", "SLO"]
    assert "1.5" in row.split()
    assert "20000/15000" in row.split()


async def test_top_gives_one_object_per_look(cluster: LocalCluster) -> None:
    ran = await run_cli("top", "--once", "--json", "--address", cluster.address)
    assert ran.exit_code == 0, ran.stderr
    tree = ran.json()
    assert tree["time_s"] > 0
    assert set(tree["skew"]) == {"total", "load", "rank", "formula"}
    assert {"cold_misses", "in_slo", "weight"} <= set(tree["adapters"][0])
    process = await start_cli("top", "--json", "--interval", "0.1", "--address", cluster.address)
    assert process.stdout is not None
    lines = [json.loads(await process.stdout.readline()) for _ in range(3)]
    process.terminate()
    await finish_cli(process)
    assert [line["cluster"] for line in lines] == ["default"] * 3
    assert sorted({line["time_s"] for line in lines}) == [line["time_s"] for line in lines]
