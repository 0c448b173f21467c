"""One comparison from beginning to end, on a cluster that runs."""

import time
from collections.abc import Sequence
from functools import partial

from loraserve.errors import WorkFailedError
from loraserve.fidelity.explain import SHAKEN, explain
from loraserve.fidelity.figures import arriving_tokens_per_s, compare
from loraserve.fidelity.fit import Fit, fit_overheads
from loraserve.fidelity.live import LiveRun, LiveSide
from loraserve.fidelity.options import FidelityOptions
from loraserve.fidelity.report import FidelityReport, LoadResult, Saturation
from loraserve.fidelity.setup import Progress
from loraserve.fidelity.simulated import Overheads, Subject, saturated_requests_per_s, simulated_runs
from loraserve.fidelity.steps import step_factors
from loraserve.fidelity.workload import flood, workload_at
from traces.records import Outcome, RequestRecord

OVERLOAD = 1.5
WARM_UP_SHARE = 0.3
"""Of the overload: batches fill meanwhile."""

_OVERLOAD_PART, _FIT_PART, _SCORED_PART = 1, 2, 10


async def run_fidelity(
    live: LiveSide, subject: Subject, options: FidelityOptions, latency_source: str, progress: Progress
) -> FidelityReport:
    """Find saturation, fit on one load, score on the others. WorkFailedError if a load cannot be fitted."""
    begun_s = time.monotonic()
    saturation = await find_saturation(live, subject, options, progress)
    load = _Loads(live, subject, options, saturation, progress)
    run = await load.run(options.fit_load, _FIT_PART)
    try:
        fit = fit_overheads(
            run.records, partial(simulated_runs, subject, run.trace, draws=options.draws), subject.latency
        )
    except ValueError as error:
        raise WorkFailedError(f"nothing can be fitted on load {options.fit_load:g}: {error}") from error
    overheads = fit.overheads
    progress(
        f"fitted: steps take {overheads.step_factor:.3f} times the model's, but their prompts' tokens "
        f"{overheads.prefill_factor:.3f} times; a message "
        f"{overheads.message_delay_s * 1e3:.2f} ms"
    )
    fitted = load.score(run, options.fit_load, fit)
    scored = [
        load.score(await load.run(share, _SCORED_PART + number), share, fit)
        for number, share in enumerate(options.loads)
    ]
    return FidelityReport(
        options=options,
        latency=subject.latency,
        latency_source=latency_source,
        saturation=saturation,
        fit=fit,
        fitted=fitted,
        scored=tuple(scored),
        took_s=time.monotonic() - begun_s,
    )


async def find_saturation(
    live: LiveSide, subject: Subject, options: FidelityOptions, progress: Progress
) -> Saturation:
    """Where the model saturates, corrected by what the live cluster does when it is overloaded."""
    overheads = Overheads()
    predicted_per_s = saturated_requests_per_s(subject, flood(options), overheads)
    progress(f"the model saturates at {predicted_per_s:.2f} requests/s; the cluster is overloaded to see")
    trace = workload_at(options, OVERLOAD * predicted_per_s, options.overload_s, part=_OVERLOAD_PART)
    run = await live.run(trace, repeat_if_void=True)
    from_s = WARM_UP_SHARE * options.overload_s
    did = arriving_tokens_per_s(run.records, from_s=from_s)
    (simulated,) = simulated_runs(subject, run.trace, overheads, draws=1)
    said = arriving_tokens_per_s(simulated, from_s=from_s)
    if not (did > 0 and said > 0):
        raise WorkFailedError("no token came while the cluster was overloaded")
    return Saturation(predicted_per_s=predicted_per_s, live_ratio=did / said)


class _Loads:
    """The loads of one comparison."""

    def __init__(
        self,
        live: LiveSide,
        subject: Subject,
        options: FidelityOptions,
        saturation: Saturation,
        progress: Progress,
    ) -> None:
        self._live = live
        self._subject = subject
        self._options = options
        self._saturation = saturation
        self._progress = progress

    async def run(self, share: float, part: int) -> LiveRun:
        """One load on the live cluster."""
        rate = share * self._saturation.requests_per_s
        self._progress(f"load {share:g}: {rate:.2f} requests/s for {self._options.duration_s:g} s")
        trace = workload_at(self._options, rate, self._options.duration_s, part=part)
        return await self._live.run(trace, repeat_if_void=True)

    def score(self, run: LiveRun, share: float, fit: Fit) -> LoadResult:
        """The same load in the simulator, and both compared."""
        return score_load(
            run,
            self._subject,
            self._options,
            fit,
            load=share,
            requests_per_s=share * self._saturation.requests_per_s,
        )


def score_load(
    run: LiveRun, subject: Subject, options: FidelityOptions, fit: Fit, *, load: float, requests_per_s: float
) -> LoadResult:
    """Simulate what was sent and compare; what was missed is explained."""
    targets = options.targets
    predict = partial(simulated_runs, subject, run.trace, draws=options.draws)
    simulated = predict(fit.overheads)
    compared = compare(run.records, simulated, targets)
    missed = [one for one in compared if one.met is False]
    refit: Fit | None = None
    explanations: tuple[str, ...] = ()
    if missed:
        refit = fit_overheads(run.records, predict, subject.latency)
        again = compare(run.records, predict(refit.overheads), targets)
        left = [one for one in again if one.met is False]
        shaken = [
            compare(run.records, predict(fit.overheads.scaled(factor)), targets)
            for factor in (1 - SHAKEN, 1 + SHAKEN)
        ]
        explanations = explain(missed, run.processors, fit, refit, left, shaken)
    return LoadResult(
        load=load,
        requests_per_s=requests_per_s,
        live=run.records,
        simulated=simulated[0],
        compared=compared,
        processors=run.processors,
        pacing=run.summary.pacing,
        void_reason=run.void_reason,
        attempts=run.attempts,
        failed=_failed(run.records),
        simulated_failed=_failed(simulated[0]),
        steps=step_factors(run.records, subject.latency),
        refit=refit,
        explanations=explanations,
    )


def _failed(records: Sequence[RequestRecord]) -> int:
    return sum(record.outcome is not Outcome.OK for record in records)
