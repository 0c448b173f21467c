"""The steps of live replicas, as a client sees them: messages that come together were drawn together.

Says what of a latency model's step times is off, part by part, without a simulation: decoding and computing
prompts are slowed down differently by what runs beside an engine.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from loraserve.profiling.fit import PromptPart, TimedStep
from placement.latency import LatencyModel, StepCounts
from traces.quantiles import percentile
from traces.records import RequestRecord

TOGETHER_SHARE = 0.3
"""Messages that follow each other by less than this share of the usual gap are of one step."""

MIN_STEPS = 20
"""Fewer steps of a kind say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFactors:
    """How many times longer live steps take than the model says: the part that computes prompts, and all
    the rest; and from how many steps. A factor of too few is 1, or the other one.

    `spread` is how far single steps are from that: the 5th and the 95th percentile of their ratios.
    """

    decode: float
    prefill: float
    decode_steps: int
    prefill_steps: int
    spread: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Message:
    """One message of a stream; `place` counts the request's messages, the first one's is 0."""

    at_s: float
    record: RequestRecord
    place: int


def step_factors(records: Sequence[RequestRecord], model: LatencyModel) -> StepFactors:
    """Compare the steps seen in these records with the model: first those that compute no prompt, then what
    is left of the others.

    Time in all over time in all, as queues go by the mean and not by the usual step; but without the
    hundredth of the steps that are the longest and the shortest for what they are, such as stalls.
    """
    parts = [_Part(step.ms, *_parts_ms(step, model)) for step in seen_steps(records)]
    decoding = _usual([part for part in parts if not part.prompt_ms])
    computing = _usual([part for part in parts if part.prompt_ms])
    decode = prefill = 1.0
    if len(decoding) >= MIN_STEPS:
        decode = prefill = sum(part.ms for part in decoding) / sum(part.rest_ms for part in decoding)
    if len(computing) >= MIN_STEPS:
        left_ms = sum(part.ms - decode * part.rest_ms for part in computing)
        # No prompt is computed for nothing: less than that comes of messages that were taken for one step's.
        prefill = max(left_ms / sum(part.prompt_ms for part in computing), 0.1)
    ratios = sorted(part.ratio for part in parts)
    return StepFactors(
        decode=decode,
        prefill=prefill,
        decode_steps=len(decoding),
        prefill_steps=len(computing),
        spread=(percentile(ratios, 5) or 1.0, percentile(ratios, 95) or 1.0),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A step's time, and what the model says: of its prompts' tokens, and of the rest."""

    ms: float
    rest_ms: float
    prompt_ms: float

    @property
    def ratio(self) -> float:
        """Live over model."""
        return self.ms / max(self.rest_ms + self.prompt_ms, 1e-9)


def _usual(parts: Sequence[_Part]) -> list[_Part]:
    """Without the hundredth at either end."""
    cut = len(parts) // 100
    return sorted(parts, key=lambda part: part.ratio)[cut : len(parts) - cut]


def seen_steps(records: Sequence[RequestRecord]) -> list[TimedStep]:
    """The steps of all replicas that follow another one without a pause: those in which a request goes on
    that had a token in the step before."""
    replicas: dict[str | None, list[RequestRecord]] = {}
    for record in records:
        replicas.setdefault(record.replica_id, []).append(record)
    return [step for group in replicas.values() for step in _steps_of(group)]


def _steps_of(records: Sequence[RequestRecord]) -> Iterator[TimedStep]:
    gaps_s = [gap for record in records for gap in record.gaps_s()]
    if not gaps_s:
        return
    for before, after in pairwise(_together(records, TOGETHER_SHARE * median(gaps_s))):
        going_on = {message.record.index for message in before} & {message.record.index for message in after}
        ms = (after[0].at_s - before[0].at_s) * 1e3
        if going_on and ms > 0:
            yield _timed(ms, after)


def _together(records: Iterable[RequestRecord], apart_s: float) -> list[list[_Message]]:
    """Messages in the order of time, those of one step together: no two of one request."""
    messages = sorted(
        (
            _Message(at_s, record, place)
            for record in records
            for place, at_s in enumerate(record.message_times_s)
        ),
        key=lambda message: message.at_s,
    )
    steps: list[list[_Message]] = []
    seen: set[int] = set()
    for message in messages:
        if not steps or message.record.index in seen or message.at_s - steps[-1][-1].at_s > apart_s:
            steps.append([])
            seen = set()
        steps[-1].append(message)
        seen.add(message.record.index)
    return steps


def _timed(ms: float, messages: Sequence[_Message]) -> TimedStep:
    decoding = [message for message in messages if message.place > 0]
    return TimedStep(
        ms=ms,
        decode_ranks=tuple(message.record.rank or 0 for message in decoding),
        context_tokens=sum(message.record.prompt_tokens + message.place for message in decoding),
        prompts=tuple(
            PromptPart(tokens=message.record.prompt_tokens, rank=message.record.rank or 0)
            for message in messages
            if message.place == 0
        ),
        adapters=len({message.record.adapter for message in messages} - {None}),
    )


def _parts_ms(step: TimedStep, model: LatencyModel) -> tuple[float, float]:
    """What the model says of a step without its prompts' tokens, and of these."""
    counts = step.counts(model.kernel, model.max_lora_rank)
    prompts = StepCounts(
        prefill_tokens=counts.prefill_tokens,
        prefill_pairs=counts.prefill_pairs,
        prefill_rank=counts.prefill_rank,
    )
    prompt_ms = model.step_ms(prompts) - model.base_ms
    return model.step_ms(counts) - prompt_ms, prompt_ms if step.prompts else 0.0
