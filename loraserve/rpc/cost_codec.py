"""The costs of replicas on the wire and as values; a table names each kind once."""

from collections.abc import Iterable, Sequence

from loraserve.errors import BadInputError
from loraserve.rpc.internal.v1 import internal_pb2
from placement.latency import COEFFICIENTS, LatencyModel, RankKernel
from placement.profile import OperatingPoint
from placement.routing.replica_cost import ReplicaCost


def distinct(costs: Iterable[ReplicaCost | None]) -> dict[ReplicaCost, int]:
    """Each cost with its place from 1, in the order in which they come; 0 is for none."""
    places: dict[ReplicaCost, int] = {}
    for cost in costs:
        if cost is not None:
            places.setdefault(cost, len(places) + 1)
    return places


def encode_cost(cost: ReplicaCost) -> internal_pb2.ReplicaCost:
    """The cost as a table carries it."""
    message = internal_pb2.ReplicaCost(
        kernel=cost.latency.kernel.value,
        max_lora_rank=cost.latency.max_lora_rank,
        max_num_seqs=cost.max_num_seqs,
        max_num_batched_tokens=cost.max_num_batched_tokens,
        kv_tokens=cost.kv_tokens,
        adapter_slots=cost.adapter_slots,
        operating_points=[
            internal_pb2.OperatingPoint(rank=point.rank, tokens_per_s=point.tokens_per_s)
            for point in cost.operating_points
        ],
        tbt_slo_ms=cost.tbt_slo_ms or 0.0,
    )
    for name in COEFFICIENTS:
        setattr(message, name, getattr(cost.latency, name))
    return message


def decode_cost(message: internal_pb2.ReplicaCost, where: str) -> ReplicaCost:
    """The cost in a message; BadInputError, which names `where`, for one that cannot be."""
    try:
        if not (message.max_num_seqs and message.max_num_batched_tokens and message.kv_tokens):
            raise ValueError("a batch or a KV cache of 0; expected limits of at least 1")
        return ReplicaCost(
            latency=LatencyModel(
                kernel=RankKernel(message.kernel),
                max_lora_rank=message.max_lora_rank,
                **{name: getattr(message, name) for name in COEFFICIENTS},
            ),
            max_num_seqs=message.max_num_seqs,
            max_num_batched_tokens=message.max_num_batched_tokens,
            kv_tokens=message.kv_tokens,
            adapter_slots=message.adapter_slots,
            operating_points=tuple(
                OperatingPoint(rank=point.rank, tokens_per_s=point.tokens_per_s)
                for point in message.operating_points
            ),
            tbt_slo_ms=message.tbt_slo_ms or None,
        )
    except ValueError as error:
        raise BadInputError(f"{where}: {error}") from error


def place_of(costs: Sequence[ReplicaCost], place: int, where: str) -> ReplicaCost | None:
    """The cost at a place from 1, None at 0; BadInputError beyond the last."""
    if place > len(costs):
        raise BadInputError(f"{where}: cost {place}; expected at most {len(costs)}, the table's costs")
    return costs[place - 1] if place else None
