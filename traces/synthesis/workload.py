"""Workloads by name and a few words: a preset or the default, with what is asked to be different."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from traces.columns import TraceColumns
from traces.synthesis.arrivals import ARRIVALS
from traces.synthesis.checks import check_above_zero
from traces.synthesis.drift import DRIFTS
from traces.synthesis.lengths import LENGTHS, Limits
from traces.synthesis.notation import read_law
from traces.synthesis.popularity import POPULARITY
from traces.synthesis.presets import preset
from traces.synthesis.ranks import RANKS
from traces.synthesis.spec import WorkloadSpec, synthesise
from traces.types import TraceError

PREFIX = "preset:"
DEFAULT = "loraserve-uniform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What is to differ from a preset; None leaves it. Laws are text, see `traces.synthesis.notation`.

    Of `rate` (requests per second), `duration` (seconds) and `requests` at most two can be given; the
    preset's rate, or else its duration, fills in the rest.
    """

    rate: float | None = None
    duration: float | None = None
    requests: int | None = None
    adapters: int | None = None
    ranks: str | None = None
    correlation: float | None = None
    arrivals: str | None = None
    popularity: str | None = None
    drift: str | None = None
    lengths: str | None = None
    max_prompt: int | None = None
    max_output: int | None = None
    over: str | None = None
    base_share: float | None = None
    seed: int | None = None


_NAMES = {field.name.replace("_", "-"): field.name for field in fields(Overrides)}
_KINDS = {
    "rate": float,
    "duration": float,
    "requests": int,
    "adapters": int,
    "correlation": float,
    "max_prompt": int,
    "max_output": int,
    "base_share": float,
    "seed": int,
}
_PLAIN_RANKS = re.compile(r"[0-9]+(?:[,/ ]+[0-9]+)*", re.ASCII)
_NEXT = re.compile(rf",(?=(?:{'|'.join(_NAMES)})=)")


def workload(name: str, overrides: Overrides | None = None) -> TraceColumns:
    """The columns of a preset: `loraserve-skew`, or as text `preset:loraserve-skew,adapters=50,rate=32`.

    What the text says wins over `overrides`. TraceError says in one line what is not possible.
    """
    return synthesise(workload_spec(name, overrides))


def is_preset(text: str) -> bool:
    """Whether a trace argument names a preset and no file."""
    return text.startswith(PREFIX)


def named_settings(text: str) -> frozenset[str]:
    """The names of the `Overrides` that a preset's text has itself: `rate` for `preset:slora,rate=3`."""
    _, *settings = _NEXT.split(text)
    return frozenset(_NAMES[setting.partition("=")[0]] for setting in settings)


def workload_spec(name: str, overrides: Overrides | None = None) -> WorkloadSpec:
    """The spec behind `workload`."""
    plain, *settings = _NEXT.split(name.removeprefix(PREFIX))
    asked = replace(overrides or Overrides(), **_read_settings(settings))
    _check_adapters(asked)
    chosen = preset(plain)
    return _different(chosen.spec(plain, asked.adapters), asked)


def _read_settings(settings: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        name = _NAMES[key]
        try:
            found[name] = _KINDS.get(name, str)(text)
        except ValueError as error:
            raise TraceError(f"{key}: {text[:80]!r} is no number") from error
    return found


def _check_adapters(asked: Overrides) -> None:
    if asked.adapters is not None and asked.adapters < 1:
        raise TraceError(f"{asked.adapters} adapters are not possible; it must be at least 1")


def _different(spec: WorkloadSpec, asked: Overrides) -> WorkloadSpec:
    requests, duration_s = _load_of(spec, asked)
    changes: dict[str, Any] = {"num_requests": requests, "duration_s": duration_s}
    laws: Mapping[str, Mapping[str, type[object]]] = {
        "ranks": RANKS,
        "arrivals": ARRIVALS,
        "popularity": POPULARITY,
        "drift": DRIFTS,
        "lengths": LENGTHS,
    }
    for field, known in laws.items():
        text = getattr(asked, field)
        if field == "ranks" and text is not None and _PLAIN_RANKS.fullmatch(text):
            text = "equal:" + re.sub(r"[, ]+", "/", text.strip())
        if text is not None:
            changes[field] = read_law(text, known, field)
    for field in ("correlation", "base_share", "seed"):
        if getattr(asked, field) is not None:
            changes[field] = getattr(asked, field)
    changes["limits"] = _limits(spec.limits, asked)
    return replace(spec, **changes)


def _limits(limits: Limits, asked: Overrides) -> Limits:
    changes: dict[str, Any] = {}
    if asked.max_prompt is not None:
        changes["max_prompt_tokens"] = asked.max_prompt
    if asked.max_output is not None:
        changes["max_output_tokens"] = asked.max_output
    if asked.over is not None:
        changes["over"] = asked.over
    return replace(limits, **changes)


def _load_of(spec: WorkloadSpec, asked: Overrides) -> tuple[int, float]:
    """Requests and seconds."""
    if asked.rate is not None:
        check_above_zero("the rate", asked.rate, 1e9)
    if asked.duration is not None:
        check_above_zero("the duration", asked.duration, 1e10)
    if asked.requests is None:
        duration_s = asked.duration or spec.duration_s
        return max(1, round((asked.rate or spec.rate_per_s) * duration_s)), duration_s
    if asked.rate and asked.duration:
        raise TraceError("of rate, duration and requests give two at most; the third follows")
    return asked.requests, asked.duration or asked.requests / (asked.rate or spec.rate_per_s)
