"""The workloads of a comparison: Poisson arrivals, lengths drawn evenly, adapters of every rank."""

from loraserve.errors import BadInputError
from loraserve.fidelity.options import ADAPTERS_PER_RANK, FidelityOptions
from traces.columns import TraceColumns
from traces.synthesis.arrivals import Poisson
from traces.synthesis.lengths import UniformLengths
from traces.synthesis.ranks import EqualRanks
from traces.synthesis.spec import WorkloadSpec, synthesise
from traces.types import TraceError

SATURATING_REQUESTS = 300
"""Per replica, all at once: enough that the batch is full most of the time."""


def workload_at(
    options: FidelityOptions, requests_per_s: float, duration_s: float, *, part: int
) -> TraceColumns:
    """Requests at this mean rate for about so long; each `part` of a comparison draws its own."""
    return _synthesise(options, max(2, round(requests_per_s * duration_s)), duration_s, part)


def flood(options: FidelityOptions) -> TraceColumns:
    """So many requests at once that every replica is saturated for a while."""
    return _synthesise(options, SATURATING_REQUESTS * options.replicas, 0.01, 99)


def _synthesise(options: FidelityOptions, num_requests: int, duration_s: float, part: int) -> TraceColumns:
    lengths = options.lengths
    try:
        return synthesise(
            WorkloadSpec(
                num_requests=num_requests,
                duration_s=duration_s,
                num_adapters=ADAPTERS_PER_RANK * len(options.ranks),
                arrivals=Poisson(),
                lengths=UniformLengths(
                    prompt_low=lengths.prompt[0],
                    prompt_high=lengths.prompt[1],
                    output_low=lengths.output[0],
                    output_high=lengths.output[1],
                ),
                ranks=EqualRanks(of=options.ranks),
                seed=1000 * options.seed + part,
                name="fidelity",
            )
        )
    except TraceError as error:
        raise BadInputError(f"the workload cannot be made: {error}") from error
