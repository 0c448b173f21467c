"""What a client saw of one request, and its form in a JSON lines file.

All times are seconds on one clock whose zero is the start of the run.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from traces.types import TraceError


class Outcome(StrEnum):
    """How a request ended, as the client saw it."""

    OK = "ok"
    REFUSED = "refused"
    FAILED = "failed"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One finished request.

    `message_times_s` says when each message with tokens came, `message_tokens` how many it carried;
    the first one holds the first token. `rank` None with an adapter is an unknown rank. `attempts` is how
    often it was sent, and `resumed` whether it went on elsewhere after some of its output.
    """

    index: int
    request_id: str
    adapter: str | None
    rank: int | None
    scheduled_s: float
    sent_s: float
    end_s: float
    prompt_tokens: int
    output_tokens: int
    expected_output_tokens: int
    outcome: Outcome
    status: str = ""
    message_times_s: tuple[float, ...] = ()
    message_tokens: tuple[int, ...] = ()
    replica_id: str | None = None
    adapter_version: str | None = None
    warmup: bool = False
    attempts: int = 1
    resumed: bool = False

    def __post_init__(self) -> None:
        if len(self.message_times_s) != len(self.message_tokens):
            raise TraceError(
                f"request {self.request_id}: {len(self.message_times_s)} message times but"
                f" {len(self.message_tokens)} token counts; there must be one of each per message"
            )

    @property
    def first_token_s(self) -> float | None:
        """When the first token came; None if none did."""
        return self.message_times_s[0] if self.message_times_s else None

    @property
    def last_token_s(self) -> float | None:
        """When the last token came; None if none did."""
        return self.message_times_s[-1] if self.message_times_s else None

    def gaps_s(self) -> Iterator[float]:
        """Seconds between consecutive messages."""
        return (later - earlier for earlier, later in itertools.pairwise(self.message_times_s))


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """Write one JSON object per line, keys as the fields of `RequestRecord`."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), allow_nan=False, separators=(",", ":")) + "\n")


def read_records(path: Path) -> tuple[RequestRecord, ...]:
    """Read what `write_records` wrote; TraceError names the line that is none of it."""
    records = []
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            try:
                records.append(_record_from(json.loads(text)))
            except (ValueError, TypeError, KeyError) as error:
                what = f"not a request record ({error}); expected a line that write_records wrote"
                raise TraceError(what, source=str(path), line=line) from error
    return tuple(records)


def _record_from(tree: dict[str, Any]) -> RequestRecord:
    return RequestRecord(
        **{
            **tree,
            "outcome": Outcome(tree["outcome"]),
            "message_times_s": tuple(tree["message_times_s"]),
            "message_tokens": tuple(tree["message_tokens"]),
        }
    )
