"""What `loraserve trace` prints."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loraserve.cli.common import echo_json

if TYPE_CHECKING:
    from traces.columns import TraceColumns
    from traces.stats import LengthStats, TraceStats


def print_stats(stats: "TraceStats", *, json_output: bool) -> None:
    """The figures of a trace, as JSON or as lines."""
    if json_output:
        echo_json(stats)
        return
    for name, value in _told(stats):
        typer.echo(f"{name:12}{value}")


def print_converted(columns: "TraceColumns", out: Path, chosen: str, *, json_output: bool) -> None:
    """What was written, and what of the trace it has no place for."""
    lost = "block hashes" if chosen == "slora" and columns.hash_ids is not None else ""
    if json_output:
        echo_json(
            {
                "out": str(out),
                "format": chosen,
                "from": columns.format,
                "requests": len(columns),
                "bad_rows": columns.num_bad_rows,
                "duration_s": columns.duration_s,
                "left_out": lost,
            }
        )
        return
    typer.echo(
        f"{out}: {len(columns):,} requests in {columns.duration_s:,.6g} s, {columns.format} to {chosen}"
    )
    if columns.num_bad_rows:
        typer.echo(f"left out: {columns.num_bad_rows:,} rows that are no requests")
    if lost:
        typer.echo(f"left out: {lost}, for which a .csv has no place; .jsonl and .parquet keep them")


def _told(stats: "TraceStats") -> list[tuple[str, str]]:
    """The figures as lines for a person."""
    lines = [
        ("trace", f"{stats.source} ({stats.format})"),
        ("requests", f"{stats.requests:,} in {stats.duration_s:,.6g} s"),
        ("rate", f"{_number(stats.rate_per_s)}/s mean, {stats.peak_per_s:,}/s peak (1 s)"),
        ("gaps", f"CV {_number(stats.gap_cv)} (1 for Poisson)"),
        ("prompt", _length_text(stats.prompt_tokens)),
        ("output", _length_text(stats.output_tokens)),
    ]
    if stats.bad_rows:
        lines.insert(2, ("left out", f"{stats.bad_rows:,} rows that are no requests"))
    lines += _adapter_lines(stats)
    if stats.repeated_block_share is not None:
        share = f"{stats.repeated_block_share:.0%} of them repeat an earlier one"
        lines.append(("blocks", f"{stats.blocks:,} of {stats.block_tokens} tokens; {share}"))
    return lines


def _adapter_lines(stats: "TraceStats") -> list[tuple[str, str]]:
    lines = []
    if stats.adapters is not None:
        found = stats.adapters
        unused = f", {found.named - found.used:,} of them unused" if found.named > found.used else ""
        ranks = ", ".join(
            f"{rank}: {uses / max(found.requests, 1):.0%}" for rank, uses in found.ranks.items()
        )
        lines += [
            ("adapters", f"{found.named:,}{unused}; {found.requests:,} requests name one"),
            (
                "popularity",
                f"top 1 {found.top1_share:.0%}, top 10 {found.top10_share:.0%}, Zipf {_number(found.zipf)}",
            ),
            ("ranks", ranks),
        ]
    if stats.drift is not None and stats.drift.overlap is not None:
        drift = stats.drift
        lines.append(
            (
                "drift",
                f"{drift.overlap:.0%} of the top {drift.top} stay, from {drift.window_s:,.6g} s to the next",
            )
        )
    return lines


def _length_text(lengths: "LengthStats | None") -> str:
    if lengths is None:
        return "not known"
    return (
        f"p50 {lengths.p50:,.0f}, p95 {lengths.p95:,.0f}, p99 {lengths.p99:,.0f}, mean {lengths.mean:,.0f},"
        f" most {lengths.max:,} tokens"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
