"""What a simulation gives: one row per request, what every replica did, and what the policy did."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loraserve.engines.replica_model.log import ReplicaLog
from traces.columns import TraceAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """What one epoch of the policy did, up to `time_ps`, its end.

    `copies` counts the adapters that each replica of `SimulationResult.replica_ids` holds then, and
    `resident_bytes` are the bytes of all of them. `loads` are the copies that were begun in it, `bytes_moved`
    theirs, `cold_misses` the requests that had to wait for one. Of all adapters together,
    `demand_tokens_per_s` is what came in the last window, by when requests arrived, and
    `forecast_tokens_per_s` what this epoch was planned for, 0 in the first.
    """

    time_ps: int
    table_version: int
    copies: tuple[int, ...]
    resident_bytes: int
    bytes_moved: int
    loads: int
    cold_misses: int
    demand_tokens_per_s: float = 0.0
    forecast_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """One run of the simulator.

    A request's index is its row of the trace. Times are int64 picoseconds since the trace's zero, -1 for
    never; `end_ps` is the last token's time, or when the request was refused or failed. `output_tokens` is
    what was expected, `drawn_tokens` what came (int32). `adapter` (int32) is a place in `adapters`, -1 the
    base model; `replica` (int32) the place in `replica_ids` of the last one that had it, -1 none; `outcome`
    (int8) a place in `tuple(traces.records.Outcome)`; `statuses` has a line for each row that failed.

    `logs` holds one log per life of a replica and `log_replica` its place in `replica_ids`. `wall_s` is
    what the simulation took on this machine, the only field that two runs of one scenario may differ in.
    `scenario` says in plain values what was simulated.
    """

    arrival_ps: NDArray[np.int64]
    first_ps: NDArray[np.int64]
    end_ps: NDArray[np.int64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    drawn_tokens: NDArray[np.int32]
    adapter: NDArray[np.int32]
    adapters: tuple[TraceAdapter, ...]
    replica: NDArray[np.int32]
    replica_ids: tuple[str, ...]
    router: NDArray[np.int16]
    attempts: NDArray[np.int16]
    outcome: NDArray[np.int8]
    statuses: Mapping[int, str] = field(default_factory=dict)
    logs: tuple[ReplicaLog, ...]
    log_replica: tuple[int, ...]
    epochs: tuple[EpochRecord, ...] = ()
    policy: str
    routing: str
    seed: int
    wall_s: float
    num_events: int
    bytes_moved: int
    cold_misses: int
    scenario: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrival_ps)
