"""Costs, ranks and spill on the wire."""

from dataclasses import replace

import pytest

from loraserve.errors import BadInputError
from loraserve.rpc import table_codec
from placement.latency import COEFFICIENTS, LatencyModel, RankKernel
from placement.profile import OperatingPoint
from placement.routing.chooser import RankLoad
from placement.routing.replica_cost import ReplicaCost
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId


def table() -> RoutingTable:
    """Three replicas of two kinds and one of which nothing is known."""
    values = {name: 0.5 + index for index, name in enumerate(COEFFICIENTS)}
    one = ReplicaCost(
        latency=LatencyModel(kernel=RankKernel.SUM, max_lora_rank=64, **values),
        max_num_seqs=7,
        kv_tokens=10**10,
        adapter_slots=3,
        operating_points=(OperatingPoint(rank=8, tokens_per_s=100.5),),
        tbt_slo_ms=75.0,
    )
    other = replace(one, latency=replace(one.latency, kernel=RankKernel.PADDED_CONFIG), tbt_slo_ms=None)
    costs = {"r0": one, "r1": other, "r2": one, "r3": None}
    replicas = {
        ReplicaId(name): TableReplica(replica_id=ReplicaId(name), address="a:1", max_lora_rank=64, cost=cost)
        for name, cost in costs.items()
    }
    holders = (
        Holder(replica_id=ReplicaId("r0"), share=1.0),
        Holder(replica_id=ReplicaId("r1"), share=0.0, spill=True),
    )
    entry = TableEntry(name=AdapterName("a"), version_id=VersionId("a@1"), rank=8, holders=holders)
    return RoutingTable(version=2, replicas=replicas, entries={entry.name: entry})


def test_costs_and_spill_survive_the_wire_and_equal_costs_go_once() -> None:
    sent = table_codec.encode_table(table())
    assert [replica.cost for replica in sent.replicas] == [1, 2, 1, 0]
    assert len(sent.costs) == 2
    assert table_codec.decode_table(sent) == table()


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("kernel", "magic", r"routing table 2: costs\[0\]: 'magic' is not a valid RankKernel"),
        ("row_ms", -1.0, r"costs\[0\]: row_ms: -1.0; expected milliseconds"),
        ("max_num_seqs", 0, r"costs\[0\]: a batch or a KV cache of 0"),
    ],
)
def test_a_cost_that_cannot_be_is_refused(field: str, value: object, line: str) -> None:
    sent = table_codec.encode_table(table())
    setattr(sent.costs[0], field, value)
    with pytest.raises(BadInputError, match=line):
        table_codec.decode_table(sent)


def test_a_cost_that_the_table_lacks_is_refused() -> None:
    sent = table_codec.encode_table(table())
    sent.replicas[0].cost = 3
    with pytest.raises(BadInputError, match="replica r0: cost 3; expected at most 2"):
        table_codec.decode_table(sent)


def test_the_load_by_rank_survives_the_wire() -> None:
    report = table_codec.LoadReport(
        replica_id=ReplicaId("r0"),
        incarnation="i",
        sequence=3,
        running=3,
        waiting=2,
        outstanding_tokens=300,
        kv_cache_usage=0.25,
        prompt_tokens=321.5,
        ranks=(RankLoad(0, 1, 0, 0), RankLoad(64, 2, 2, 900)),
    )
    assert table_codec.decode_load(table_codec.encode_load(report)) == report
