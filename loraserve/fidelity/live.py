"""The live side of a comparison: workloads replayed through the routers, and what the processors did."""

import asyncio
import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraserve.client import Client
from loraserve.client_types import AdapterStatus, ClusterStatus
from loraserve.errors import WorkFailedError
from loraserve.fidelity.processors import ProcessorMeter, ProcessorUse, Roles
from loraserve.replay.runner import ReplayOptions, run_replay
from loraserve.replay.workload import WorkloadOptions
from traces.columns import TraceColumns, columns_of
from traces.metrics import Summary
from traces.records import RequestRecord
from traces.write import write_columns

DEADLINE_S = 600.0
HELD_TIMEOUT_S = 120.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LiveRun:
    """One workload as it was sent, its records and what the processors did meanwhile."""

    trace: TraceColumns
    records: tuple[RequestRecord, ...]
    summary: Summary
    processors: ProcessorUse
    attempts: int = 1
    max_others: float = 1.0

    @property
    def void_reason(self) -> str:
        """Why the run proves nothing; '' if it does."""
        if self.processors.others > self.max_others:
            return (
                f"other programs took {self.processors.others:.0%} of the machine, above "
                f"{self.max_others:.0%}: the engine was slowed down by them"
            )
        return self.summary.void_reason


class LiveSide(Protocol):
    """What is compared with the simulator, as `LiveCluster` is."""

    async def run(self, trace: TraceColumns, *, repeat_if_void: bool = False) -> LiveRun:
        """Send this workload, once more if the run is void and that is asked for."""
        ...


class LiveCluster:
    """A running cluster by its routers; knows nothing of how it was started."""

    def __init__(
        self, addresses: tuple[str, ...], roles: Roles, *, look_aside: bool, max_others: float, seed: int
    ) -> None:
        self._addresses = addresses
        self._roles = roles
        self._look_aside = look_aside
        self._max_others = max_others
        self._seed = seed
        self._num_runs = 0

    async def register(
        self, adapters: Mapping[str, Path]
    ) -> tuple[tuple[AdapterStatus, ...], dict[str, int]]:
        """Register adapters and wait until the plan is carried out; what is registered, and how many
        adapters each replica holds at most."""
        async with Client(self._addresses) as client:
            await client.wait_ready(30.0)
            for name, folder in adapters.items():
                await client.register_adapter(name, str(folder))
            status = await self._settled(client, len(adapters))
        return status.adapters, {one.replica_id: one.pool_adapters for one in status.replicas}

    async def _settled(self, client: Client, num_adapters: int) -> ClusterStatus:
        """Every adapter on as many replicas as hold it by the table, which stays as it is."""
        last: tuple[tuple[str, tuple[str, ...]], ...] = ()
        try:
            async with asyncio.timeout(HELD_TIMEOUT_S):
                while True:
                    status = await client.status()
                    held = tuple((one.replica_id, one.resident) for one in status.replicas)
                    complete = sum(len(resident) for _, resident in held) == sum(
                        len(one.holders) for one in status.adapters
                    )
                    if (
                        len(status.adapters) == num_adapters
                        and complete
                        and held == last
                        and any(resident for _, resident in held)
                    ):
                        return status
                    last = held
                    await asyncio.sleep(5 * POLL_S)
        except TimeoutError:
            raise WorkFailedError(
                f"the adapters were not in place after {HELD_TIMEOUT_S:g} s; held: {last}"
            ) from None

    async def run(self, trace: TraceColumns, *, repeat_if_void: bool = False) -> LiveRun:
        """Replay this workload; once more if the run is void."""
        done = await self._run(trace)
        if done.void_reason and repeat_if_void:
            return dataclasses.replace(await self._run(trace), attempts=2)
        return done

    async def _run(self, trace: TraceColumns) -> LiveRun:
        self._num_runs += 1
        with tempfile.TemporaryDirectory(prefix="loraserve-fidelity-") as folder:
            path = Path(folder) / "workload.csv"
            write_columns(trace, path)
            options = ReplayOptions(
                workload=WorkloadOptions(
                    # Another seed, other prompts: no cache answers what an earlier run has asked.
                    source=str(path),
                    assign="from-trace",
                    seed=1000 * self._seed + self._num_runs,
                ),
                timeout_s=DEADLINE_S,
                look_aside=self._look_aside,
            )
            meter = ProcessorMeter(self._roles)
            result = await run_replay(self._addresses, options, stop=asyncio.Event())
            use = meter.use()
        if len(result.records) != len(trace):
            raise WorkFailedError(f"{len(result.records)} of {len(trace)} requests were sent")
        return LiveRun(
            trace=columns_of(result.trace),
            records=result.records,
            summary=result.summary,
            processors=use,
            max_others=self._max_others,
        )
