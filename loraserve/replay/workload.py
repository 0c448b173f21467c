"""Which requests a replay sends: a trace, cut to size, with adapters that the cluster serves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loraserve.errors import BadInputError
from traces.assign import METHODS, AdapterRef, assign_adapters, map_adapters, unknown_adapters
from traces.columns import trace_of
from traces.read import bundled_trace, read_trace
from traces.synthesis import is_preset, workload
from traces.types import Trace, TraceError

DEMO = "demo"
ASSIGN_METHODS = ("auto", "from-trace", "map", *METHODS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """`source` is a file, 'demo' or 'preset:NAME'; `duration_s` is on the trace's own
    clock, before any speedup.

    `assign`: `from-trace` takes the trace's adapters, which must all be registered; `map` gives its k-th
    most popular name the k-th adapter; the others draw one per request; `auto` is `map` for a trace with
    adapters and `round-robin` for one without. `adapters` () means all registered ones.
    Lengths above `max_prompt_tokens` or `max_output_tokens` are cut to them.
    """

    source: str
    format: str | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    limit: int | None = None
    duration_s: float | None = None
    assign: str = "auto"
    adapters: tuple[str, ...] = ()
    parameter: float | None = None
    base_share: float = 0.0
    seed: int = 0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None


def read_workload(options: WorkloadOptions) -> Trace:
    """The trace's requests, cut; BadInputError says what is wrong with it and where."""
    if options.assign not in ASSIGN_METHODS:
        raise BadInputError(f"--assign: {options.assign} is unknown; allowed: {', '.join(ASSIGN_METHODS)}")
    try:
        if options.source == DEMO:
            return bundled_trace().cut(limit=options.limit, duration_s=options.duration_s)
        if is_preset(options.source):
            made = trace_of(workload(options.source))
            return made.cut(limit=options.limit, duration_s=options.duration_s)
        return read_trace(
            options.source,
            format=options.format,
            on_bad_row=options.on_bad_row,
            limit=options.limit,
            duration_s=options.duration_s,
        )
    except TraceError as error:
        raise BadInputError(str(error)) from error
    except OSError as error:
        raise BadInputError(f"{options.source}: cannot be read: {error.strerror}") from error


def give_adapters(trace: Trace, options: WorkloadOptions, registered: Sequence[AdapterRef]) -> Trace:
    """The trace with registered adapters and their ranks in every request that is not the base model's."""
    chosen = _choose(options.adapters, registered)
    method = options.assign
    if method == "auto":
        method = "map" if trace.adapter_counts() else "round-robin"
        if not chosen:
            method = "base"
    try:
        match method:
            case "from-trace":
                if missing := unknown_adapters(trace, (one.name for one in chosen)):
                    raise BadInputError(
                        f"the trace names adapters that are not registered: {_some(missing)}; register them, "
                        "or use --assign map"
                    )
                return map_adapters(trace, chosen)
            case "map":
                return map_adapters(trace, chosen)
            case "base":
                return assign_adapters(trace, (), base_share=1.0)
            case _:
                return assign_adapters(
                    trace,
                    chosen,
                    method=method,
                    seed=options.seed,
                    parameter=options.parameter,
                    base_share=options.base_share,
                )
    except TraceError as error:
        raise BadInputError(f"--assign {options.assign}: {error}") from error


def shorten(trace: Trace, options: WorkloadOptions) -> tuple[Trace, int]:
    """The trace with no length above the options' limits, and how many requests that changed."""
    prompt_limit, output_limit = options.max_prompt_tokens, options.max_output_tokens
    requests, changed = [], 0
    for request in trace.requests:
        prompt_tokens = min(request.prompt_tokens, prompt_limit or request.prompt_tokens)
        output_tokens = min(request.output_tokens, output_limit or request.output_tokens)
        if (prompt_tokens, output_tokens) != (request.prompt_tokens, request.output_tokens):
            changed += 1
            request = replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        requests.append(request)
    return replace(trace, requests=tuple(requests)), changed


def _choose(names: tuple[str, ...], registered: Sequence[AdapterRef]) -> tuple[AdapterRef, ...]:
    """The adapters of these names in this order; all of them, lowest rank first, for none."""
    if not names:
        return tuple(sorted(registered, key=lambda one: (one.rank, one.name)))
    known = {one.name: one for one in registered}
    if missing := [name for name in names if name not in known]:
        have = _some(tuple(known)) if known else "none"
        raise BadInputError(f"--adapters: not registered: {_some(missing)}; registered: {have}")
    return tuple(known[name] for name in names)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
