"""The limits and ranges of requests, each checked by one function."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from loraserve.errors import BadInputError

MAX_REQUEST_ID_CHARS = 128
MAX_ADAPTER_CHARS = 256
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_DRAIN_S = 86_400.0


def check_drain_deadline(deadline_s: float) -> None:
    """BadInputError for what is no deadline of a drain."""
    if not 0 <= deadline_s <= MAX_DRAIN_S:
        raise BadInputError(f"deadline_s: {deadline_s:g}; expected seconds from 0 to {MAX_DRAIN_S:g}")


def _number(
    name: str, low: float, high: float, what: str, *, open_low: bool = False
) -> Callable[[Any], None]:
    def check(value: float) -> None:
        inside = (low < value if open_low else low <= value) and value <= high
        if not (inside and math.isfinite(value)):
            raise BadInputError(f"sampling.{name}: {value} is not allowed; give {what}")

    return check


def _refused(name: str, why: str) -> Callable[[Any], None]:
    def check(value: object) -> None:
        raise BadInputError(f"sampling.{name}: {why}")

    return check


def _check_n(value: int) -> None:
    if value != 1:
        raise BadInputError(
            f"sampling.n: {value} is not supported; one request gives one output, so leave it at 1"
        )


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise BadInputError(f"sampling.stop: {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise BadInputError(
                f"sampling.stop[{index}]: {len(text)} characters; give 1 to {MAX_STOP_CHARS} characters"
            )


def _check_stop_token_ids(ids: Sequence[int]) -> None:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise BadInputError(
            f"sampling.stop_token_ids: {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed"
        )


def _anything(value: object) -> None:
    pass


SAMPLING_CHECKS: Mapping[str, Callable[[Any], None]] = MappingProxyType(
    {
        "temperature": _number("temperature", 0.0, math.inf, "a finite number of at least 0"),
        "top_p": _number("top_p", 0.0, 1.0, "a number above 0 and at most 1", open_low=True),
        "top_k": _number("top_k", -1, math.inf, "-1 or 0 for all tokens, or the number of tokens to keep"),
        "min_p": _number("min_p", 0.0, 1.0, "a number from 0 to 1"),
        "seed": _anything,
        "stop": _check_stop,
        "stop_token_ids": _check_stop_token_ids,
        "max_tokens": _number("max_tokens", 1, math.inf, "at least 1"),
        "min_tokens": _anything,
        "presence_penalty": _number(
            "presence_penalty",
            -MAX_PENALTY,
            MAX_PENALTY,
            f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}",
        ),
        "frequency_penalty": _number(
            "frequency_penalty",
            -MAX_PENALTY,
            MAX_PENALTY,
            f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}",
        ),
        "repetition_penalty": _number(
            "repetition_penalty",
            0.0,
            MAX_PENALTY,
            f"a number above 0 and at most {MAX_PENALTY:g}",
            open_low=True,
        ),
        "logprobs": _number("logprobs", 0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS} alternatives per token"),
        "ignore_eos": _anything,
        "n": _check_n,
        "beam_width": _refused("beam_width", "beam search is not supported; leave it out"),
        "guided": _refused("guided", "guided decoding is not supported; leave it out"),
    }
)
"""One check per field of `loraserve.v1.SamplingParams`, by field name."""
