"""A cluster to compare with the simulator that is itself simulated, with overheads that a fit must find."""

from dataclasses import replace

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.fidelity.live import LiveRun
from loraserve.fidelity.options import FidelityOptions, Lengths
from loraserve.fidelity.processors import ProcessorUse
from loraserve.fidelity.simulated import Overheads, Subject, simulated_runs
from loraserve.fidelity.workload import flood
from placement.latency import LatencyModel
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, version_id
from traces.columns import TraceColumns
from traces.metrics import summarise

IDLE = ProcessorUse(processors=2, wall_s=1.0, busy={"client": 0.1, "router": 0.2, "others": 0.0})
SHORT = FidelityOptions(duration_s=12.0, ranks=(8, 64), lengths=Lengths(prompt=(16, 128), output=(4, 40)))


def subject_for(options: FidelityOptions, **changes: object) -> Subject:
    """A cluster that serves these options' adapters, each on every replica."""
    adapters = tuple(
        AdapterVersion(
            version_id=version_id(AdapterName(one.name), f"{number:064x}"),
            name=AdapterName(one.name),
            sha256=f"{number:064x}",
            rank=one.rank or 1,
            size_bytes=1000,
        )
        for number, one in enumerate(flood(options).adapters)
    )
    subject = Subject(
        adapters=adapters,
        replicas=tuple(
            ReplicaSpec(
                replica_id=ReplicaId(f"replica-{number}"),
                max_lora_rank=128,
                pool_adapters=16,
                pool_bytes=10**9,
            )
            for number in range(options.replicas)
        ),
        limits=ReplicaLimits(kv_blocks=1000, max_num_seqs=8, max_num_batched_tokens=512),
        latency=LatencyModel(base_ms=20, row_ms=0.5, prefill_token_ms=0.1, decode_rank_ms=0.005),
        policy="least-loaded",
        routing="least-outstanding",
        routers=1,
        max_waiting=256,
        report_interval_s=0.1,
        epoch_s=60.0,
        seed=options.seed,
    )
    return replace(subject, **changes)  # type: ignore[arg-type]


class SimulatedLive:
    """Stands where a live cluster does: the subject with overheads that only it knows."""

    def __init__(
        self, subject: Subject, overheads: Overheads, *, use: ProcessorUse = IDLE, max_others: float = 1.0
    ) -> None:
        self._subject = subject
        self._overheads = overheads
        self._use = use
        self._max_others = max_others

    async def run(self, trace: TraceColumns, *, repeat_if_void: bool = False) -> LiveRun:
        """What this cluster does with the workload."""
        (records,) = simulated_runs(self._subject, trace, self._overheads, draws=1)
        summary = summarise(records, live=True)
        return LiveRun(
            trace=trace, records=records, summary=summary, processors=self._use, max_others=self._max_others
        )
