"""Routing tables and load reports on the wire and as values."""

from dataclasses import dataclass

from loraserve.errors import BadInputError
from loraserve.rpc.codec import PROTOCOL_VERSION, check_protocol
from loraserve.rpc.cost_codec import decode_cost, distinct, encode_cost, place_of
from loraserve.rpc.internal.v1 import internal_pb2
from placement.routing.chooser import RankLoad
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a replica says of its load; `sequence` grows by one per report of one `incarnation`.

    `routers` counts the routers connected. The next three are measured lately, 0 for not known:
    requests per second that got their first token while others waited, seconds between two tokens of
    one request, and tokens of an output; so is `prompt_tokens`, of a prompt. `ranks` has all requests by
    rank, the lowest first.
    """

    replica_id: ReplicaId
    incarnation: str
    sequence: int
    running: int
    waiting: int
    outstanding_tokens: int
    kv_cache_usage: float
    routers: int = 1
    starts_per_s: float = 0.0
    token_s: float = 0.0
    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    ranks: tuple[RankLoad, ...] = ()


def encode_table(table: RoutingTable) -> internal_pb2.RoutingTable:
    """The table as the controller publishes it."""
    costs = distinct(replica.cost for replica in table.replicas.values())
    return internal_pb2.RoutingTable(
        protocol_version=PROTOCOL_VERSION,
        version=table.version,
        base_model=table.base_model,
        replicas=[
            internal_pb2.TableReplica(
                replica_id=replica.replica_id,
                address=replica.address,
                max_lora_rank=replica.max_lora_rank,
                draining=replica.draining,
                cost=0 if replica.cost is None else costs[replica.cost],
            )
            for replica in table.replicas.values()
        ],
        entries=[
            internal_pb2.TableEntry(
                name=entry.name,
                version_id=entry.version_id,
                rank=entry.rank,
                holders=[
                    internal_pb2.TableHolder(
                        replica_id=holder.replica_id, share=holder.share, spill=holder.spill
                    )
                    for holder in entry.holders
                ],
            )
            for entry in table.entries.values()
        ],
        costs=[encode_cost(cost) for cost in costs],
    )


def decode_table(message: internal_pb2.RoutingTable) -> RoutingTable:
    """The table in a message; BadInputError for another protocol version, a holder that it lacks or a cost
    that cannot be."""
    check_protocol(message.protocol_version, "the controller")
    where = f"routing table {message.version}"
    costs = [decode_cost(cost, f"{where}: costs[{index}]") for index, cost in enumerate(message.costs)]
    replicas = {
        ReplicaId(replica.replica_id): TableReplica(
            replica_id=ReplicaId(replica.replica_id),
            address=replica.address,
            max_lora_rank=replica.max_lora_rank,
            draining=replica.draining,
            cost=place_of(costs, replica.cost, f"{where}: replica {replica.replica_id}"),
        )
        for replica in message.replicas
    }
    entries = {}
    for entry in message.entries:
        holders = tuple(
            Holder(replica_id=ReplicaId(holder.replica_id), share=holder.share, spill=holder.spill)
            for holder in entry.holders
        )
        for holder in holders:
            if holder.replica_id not in replicas:
                raise BadInputError(
                    f"{where}: entries[{entry.name}]: holder {holder.replica_id}"
                    " is not among the table's replicas"
                )
        entries[AdapterName(entry.name)] = TableEntry(
            name=AdapterName(entry.name),
            version_id=VersionId(entry.version_id),
            rank=entry.rank,
            holders=holders,
        )
    return RoutingTable(
        version=message.version, base_model=message.base_model, replicas=replicas, entries=entries
    )


def encode_load(report: LoadReport) -> internal_pb2.LoadReport:
    """The report as a replica sends it."""
    return internal_pb2.LoadReport(
        protocol_version=PROTOCOL_VERSION,
        replica_id=report.replica_id,
        incarnation=report.incarnation,
        sequence=report.sequence,
        running=report.running,
        waiting=report.waiting,
        outstanding_tokens=report.outstanding_tokens,
        kv_cache_usage=report.kv_cache_usage,
        routers=report.routers,
        starts_per_s=report.starts_per_s,
        token_s=report.token_s,
        output_tokens=report.output_tokens,
        prompt_tokens=report.prompt_tokens,
        ranks=[
            internal_pb2.RankLoad(rank=rank, running=running, waiting=waiting, prefill_tokens=tokens)
            for rank, running, waiting, tokens in report.ranks
        ],
    )


def decode_load(message: internal_pb2.LoadReport) -> LoadReport:
    """The report in a message; BadInputError for another protocol version."""
    check_protocol(message.protocol_version, f"replica {message.replica_id}")
    return LoadReport(
        replica_id=ReplicaId(message.replica_id),
        incarnation=message.incarnation,
        sequence=message.sequence,
        running=message.running,
        waiting=message.waiting,
        outstanding_tokens=message.outstanding_tokens,
        kv_cache_usage=message.kv_cache_usage,
        routers=message.routers,
        starts_per_s=message.starts_per_s,
        token_s=message.token_s,
        output_tokens=message.output_tokens,
        prompt_tokens=message.prompt_tokens,
        ranks=tuple(
            [RankLoad(one.rank, one.running, one.waiting, one.prefill_tokens) for one in message.ranks]
        ),
    )
