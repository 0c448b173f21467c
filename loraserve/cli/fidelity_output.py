"""What `loraserve fidelity` shows: a table per load or JSON, and files with both sides' records and plots."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraserve.cli.common import echo_json, plain
from loraserve.errors import WorkFailedError
from loraserve.fidelity.explain import processors_line
from loraserve.fidelity.figures import LABELS

if TYPE_CHECKING:
    from rich.table import Table

    from loraserve.fidelity.fit import Fit
    from loraserve.fidelity.report import FidelityReport, LoadResult


def print_tables(report: "FidelityReport", files: tuple[Path, ...]) -> None:
    """The fit, then each load, then the worst errors."""
    from rich.console import Console

    console = Console(highlight=False)
    # On a pipe rich takes 80 columns and would cut the figures.
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    for line in _heading(report):
        console.print(line, soft_wrap=True, markup=False)
    for load, title in ((report.fitted, "fitted on"), *((one, "scored on") for one in report.scored)):
        console.print(_table(load, title))
        for line in _notes(load):
            console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print(_verdict(report), soft_wrap=True, markup=False)
    for path in files:
        console.print(f"written: {path}", soft_wrap=True, markup=False)


def print_json(report: "FidelityReport", files: tuple[Path, ...]) -> None:
    """One object; records are in the files only."""
    echo_json({**report_json(report), "files": files})


def report_json(report: "FidelityReport") -> dict[str, Any]:
    """The report in plain values, without records."""
    return {
        "options": plain(report.options),
        "targets": plain(report.options.targets),
        "latency": plain(report.latency),
        "latency_source": report.latency_source,
        "saturation": {
            **plain(report.saturation),
            "requests_per_s": report.saturation.requests_per_s,
        },
        "fit": plain(report.fit),
        "fitted": _load_json(report.fitted),
        "scored": [_load_json(load) for load in report.scored],
        "worst": report.worst(),
        "met": report.met,
        "took_s": report.took_s,
    }


def write_files(report: "FidelityReport", folder: Path) -> tuple[Path, ...]:
    """Both sides' records of every load, and a picture of each; the files written."""
    from loraserve.cli.fidelity_plot import draw
    from traces.records import write_records

    written = []
    try:
        for load, name in _named_loads(report):
            for side, records in (("live", load.live), ("simulated", load.simulated)):
                path = folder / f"{name}-{side}.jsonl"
                write_records(path, records)
                written.append(path)
            path = folder / f"{name}.png"
            path.write_bytes(draw(load))
            written.append(path)
    except OSError as error:
        raise WorkFailedError(f"--out: {folder}: cannot be written: {error.strerror}") from error
    return tuple(written)


def _named_loads(report: "FidelityReport") -> "list[tuple[LoadResult, str]]":
    scored = [(load, f"load-{load.load:g}") for load in report.scored]
    return [(report.fitted, f"fit-{report.fitted.load:g}"), *scored]


def _load_json(load: "LoadResult") -> dict[str, Any]:
    return {
        "load": load.load,
        "requests_per_s": load.requests_per_s,
        "requests": len(load.live),
        "failed": load.failed,
        "simulated_failed": load.simulated_failed,
        "figures": {one.name: plain(one) for one in load.compared},
        "pacing": plain(load.pacing),
        "void_reason": load.void_reason,
        "attempts": load.attempts,
        "processors": plain(load.processors),
        "steps": plain(load.steps),
        "refit": plain(load.refit),
        "explanations": list(load.explanations),
    }


def _heading(report: "FidelityReport") -> list[str]:
    options, saturation = report.options, report.saturation
    ranks = ", ".join(map(str, options.ranks))
    way = "clients straight to replicas" if options.look_aside else "through the router"
    return [
        f"{options.replicas} {options.engine} replicas, adapters of ranks {ranks}, {way}, "
        f"{options.duration_s:g} s per load, seed {options.seed}",
        f"latency model: {report.latency_source}",
        f"saturation: {saturation.requests_per_s:.2f} requests/s ({saturation.predicted_per_s:.2f} by the "
        f"model, times {saturation.live_ratio:.3f}, which the overloaded cluster did of it)",
        _fit_line(report.fit),
    ]


def _fit_line(fit: "Fit") -> str:
    overheads = fit.overheads
    return (
        f"fitted: step times x {overheads.step_factor:.4f}, but prompts' tokens x "
        f"{overheads.prefill_factor:.4f} ({fit.steps.decode_steps} and "
        f"{fit.steps.prefill_steps} steps); a message between router and replica "
        f"{overheads.message_delay_s * 1e3:.2f} ms each way ({fit.rounds} rounds; left: gaps x "
        f"{fit.gap_ratio:.4f}, first tokens {fit.ttft_left_ms:+.2f} ms)"
    )


def _table(load: "LoadResult", title: str) -> "Table":
    from rich.table import Table

    table = Table(
        title=f"{title} load {load.load:g}: {load.requests_per_s:.2f} requests/s, {len(load.live)} requests",
        title_justify="left",
    )
    table.add_column("figure")
    for name in ("live", "simulated", "range", "error", "target", ""):
        table.add_column(name, justify="right")
    for one in load.compared:
        table.add_row(
            LABELS[one.name],
            _number(one.live),
            _number(one.simulated),
            f"{_number(one.lowest)} to {_number(one.highest)}",
            f"{one.error:+.1%}" if math.isfinite(one.error) else "none",
            "" if one.target is None else f"{one.target:.0%}",
            "" if one.met is None else "met" if one.met else "MISSED",
        )
    return table


def _notes(load: "LoadResult") -> list[str]:
    notes = []
    pacing = load.pacing
    p99 = "none" if pacing is None or pacing.p99_ms is None else f"{pacing.p99_ms:.2f} ms"
    again = "" if load.attempts == 1 else ", repeated"
    notes.append(f"pacing p99 {p99}: {f'VOID, {load.void_reason}' if load.void_reason else 'valid'}{again}")
    if load.failed or load.simulated_failed:
        notes.append(f"not answered in full: {load.failed} live, {load.simulated_failed} simulated")
    notes.append(
        f"its own steps: x {load.steps.decode:.3f} of the latency model's, prompts' tokens x "
        f"{load.steps.prefill:.3f}"
    )
    if load.explanations:
        notes += load.explanations
    else:
        notes.append(f"processors: {processors_line(load.processors)}")
    return notes


def _verdict(report: "FidelityReport") -> str:
    worst = ", ".join(f"{LABELS[name]} {error:.1%}" for name, error in report.worst().items())
    missed = sum(len(load.missed) for load in report.scored if not load.void_reason)
    void = sum(bool(load.void_reason) for load in report.scored)
    said = "every target met" if not missed else f"{missed} targets missed"
    if report.fitted.void_reason:
        said = f"the load fitted was void, so this proves nothing: {said}"
    return f"worst errors: {worst or 'none'}; {said}{f', {void} loads void' if void else ''}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "inf" if value > 0 else "none"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
