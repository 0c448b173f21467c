"""Writing a trace in the S-LoRA layout with a rank column; `read_trace` reads it back exactly."""

import csv
import gzip
import io
from pathlib import Path

from traces.formats.slora import COLUMNS, MAX_NAME_CHARACTERS
from traces.types import Trace, TraceError


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a CSV, gzip if the name ends in `.gz`; the same trace gives the same bytes.

    Block hashes have no column here and are left out.
    """
    target = Path(path)
    text = trace_csv(trace).encode()
    target.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)


def trace_csv(trace: Trace) -> str:
    """The CSV text of a trace."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for request in trace.requests:
        if request.adapter is not None:
            _check_name(request.adapter)
        writer.writerow(
            (
                request.index,
                request.adapter or "",
                request.prompt_tokens,
                request.output_tokens,
                repr(request.arrival_s),
                "" if request.rank is None else request.rank,
            )
        )
    return buffer.getvalue()


def _check_name(adapter: str) -> None:
    if adapter in ("", "None") or adapter != adapter.strip() or not adapter.isprintable():
        raise TraceError(f"the adapter name {adapter!r} cannot be written to a trace; use printable names")
    if len(adapter) > MAX_NAME_CHARACTERS:
        raise TraceError(f"an adapter name of {len(adapter)} characters; at most {MAX_NAME_CHARACTERS}")
