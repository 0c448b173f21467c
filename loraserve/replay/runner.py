"""One whole replay against a router: workload in, records and their summary out."""

import asyncio
import gc
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loraserve.client import Client
from loraserve.clock import Clock, WallClock
from loraserve.errors import BadInputError
from loraserve.replay.dispatch import Dispatcher, DispatchOptions, Progress
from loraserve.replay.prompts import FIRST_SAFE_ID, SAFE_VOCAB_SIZE, PromptSource
from loraserve.replay.workload import WorkloadOptions, give_adapters, read_workload, shorten
from traces.assign import AdapterRef
from traces.metrics import Slo, Summary, summarise
from traces.pacing import schedule
from traces.records import RequestRecord
from traces.types import Trace, TraceError

LEAD_S = 0.2
"""Rest before the first arrival, in which the connection settles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What to send, when, and what it is judged by; `timeout_s` is each request's deadline, `look_aside` as
    `loraserve.client.Client` has it."""

    workload: WorkloadOptions
    speedup: float = 1.0
    warmup_s: float = 0.0
    warmup_requests: int = 0
    timeout_s: float = 600.0
    max_in_flight: int = 8192
    vocab_size: int = SAFE_VOCAB_SIZE
    ready_timeout_s: float = 30.0
    slo: Slo = field(default_factory=Slo)
    look_aside: bool | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.timeout_s > 0, "--timeout: must be above 0 seconds"),
            (self.max_in_flight > 0, "--max-in-flight: must be at least 1"),
            (self.warmup_s >= 0 and self.warmup_requests >= 0, "the warm-up cannot be negative"),
            (self.vocab_size > FIRST_SAFE_ID, f"--vocab-size: must be above {FIRST_SAFE_ID}"),
        )
        for holds, message in checks:
            if not holds:
                raise BadInputError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What was measured, also by a replay that was stopped early. `not_sent` requests were not due yet then;
    `shortened` ones were cut to a length limit; `local_refusals` hit `max_in_flight`."""

    trace: Trace
    records: tuple[RequestRecord, ...]
    summary: Summary
    shortened: int
    not_sent: int
    local_refusals: int
    interrupted: bool


async def run_replay(
    addresses: str | Sequence[str],
    options: ReplayOptions,
    *,
    stop: asyncio.Event,
    on_start: Callable[[Progress], None] = lambda progress: None,
    clock: Clock | None = None,
) -> ReplayResult:
    """Replay the workload through these routers; `on_start` gets the counts, which then move while it runs.

    BadInputError for a workload that cannot be sent, UnavailableError if no router is ready.
    """
    trace = await asyncio.to_thread(read_workload, options.workload)
    async with Client(addresses, look_aside=options.look_aside, timeout_s=options.timeout_s) as client:
        await client.wait_ready(options.ready_timeout_s)
        registered = [AdapterRef(name=one.name, rank=one.rank) for one in await client.list_adapters()]
        trace, shortened = shorten(give_adapters(trace, options.workload, registered), options.workload)
        dispatcher = _dispatcher(trace, client, options, clock or WallClock())
        on_start(dispatcher.progress)
        # A full collection over a large trace would hold up arrivals for tens of milliseconds.
        gc.collect()
        gc.freeze()
        try:
            records = await dispatcher.run(stop)
        finally:
            gc.unfreeze()
    progress = dispatcher.progress
    return ReplayResult(
        trace=trace,
        records=records,
        summary=summarise(records, slo=options.slo),
        shortened=shortened,
        not_sent=progress.total - progress.sent,
        local_refusals=progress.local_refusals,
        interrupted=stop.is_set(),
    )


def _dispatcher(trace: Trace, client: Client, options: ReplayOptions, clock: Clock) -> Dispatcher:
    try:
        due = schedule(trace, options.speedup)
    except TraceError as error:
        raise BadInputError(f"--speedup: {error}") from error
    longest = max(request.prompt_tokens for request in trace.requests)
    return Dispatcher(
        due,
        client,
        PromptSource(seed=options.workload.seed, longest_tokens=longest, vocab_size=options.vocab_size),
        DispatchOptions(
            run_id=f"replay-{uuid.uuid4().hex[:8]}",
            timeout_s=options.timeout_s,
            max_in_flight=options.max_in_flight,
            warmup_s=options.warmup_s,
            warmup_requests=options.warmup_requests,
            lead_s=LEAD_S,
        ),
        clock=clock,
    )
