"""Marginal-cost routing through a real router: costs from the table, loads by rank from reports."""

from dataclasses import replace

from loraserve.router.testing import table_of
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.v1 import inference_pb2
from placement.latency import LatencyModel
from placement.routing.chooser import ReplicaLoad
from placement.routing.replica_cost import ReplicaCost
from placement.table import RoutingTable
from tests.support.router_bench import Bench, MakeBench, ask, until


def costed(bench: Bench) -> RoutingTable:
    """`low` of rank 8 and `high` of rank 64, both on r0 and r1."""
    addresses = {name: fake.address for name, fake in bench.replicas.items()}
    table = table_of(1, addresses, {"low": ("r0", "r1"), "high": ("r0", "r1")})
    cost = ReplicaCost(latency=LatencyModel(base_ms=30.0, prefill_token_ms=0.05, decode_rank_ms=0.01))
    entries = {name: replace(one, rank=64 if name == "high" else 8) for name, one in table.entries.items()}
    replicas = {name: replace(one, cost=cost) for name, one in table.replicas.items()}
    return replace(table, entries=entries, replicas=replicas)


async def test_requests_go_where_their_ranks_are_and_say_so(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(routing="marginal-cost")
    for name, rank in (("r0", 8), ("r1", 64)):
        ranks = [internal_pb2.RankLoad(rank=rank, running=10)]
        bench.replicas[name].report(sequence=1, running=10, ranks=ranks)
    await bench.controller.publish(costed(bench))
    await bench.serving(True)
    await until(lambda: sum(one is not None and bool(one.ranks) for one in _loads(bench)) == 2)
    for adapter, expected in (("low", "r0"), ("high", "r1")):
        call = bench.inference.Complete(ask(adapter))
        await call
        trailers = dict(await call.trailing_metadata())
        assert (trailers["loraserve-replica"], trailers["loraserve-reason"]) == (expected, "marginal-cost")
        picked = await bench.inference.Pick(inference_pb2.PickRequest(adapter=adapter, prompt_tokens=100))
        assert (picked.replica_id, picked.reason) == (expected, "marginal-cost")
    bench.router.check_invariants()


def _loads(bench: Bench) -> list[ReplicaLoad | None]:
    return list(bench.router.loads.view().loads.values())
