"""What `scripts/bench/policies` shows: tables for a person, curves and runs as files."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from typing import Any

from policies_cases import Outcome
from policies_ratios import level

MIB = 2**20
_TOP_S = 600.0


def print_one(fleet: str, workload: str, found: Mapping[str, Any]) -> None:
    """The tables of one fleet and workload."""
    runs: Sequence[Outcome] = found["runs"]
    rates = sorted({one.rate_per_s for one in runs})
    names = list(dict.fromkeys(one.contender for one in runs))
    seeds = len({one.seed for one in runs})
    print(f"\n{fleet}, {workload}: fluid rate {found['fluid_rate_per_s']:.1f} requests/s, {seeds} seeds")
    for title, show in _TABLES.items():
        print(f"\n{title}")
        print(f"{'':26}" + "".join(f"{rate:>9.1f}" for rate in rates))
        for name in names:
            cells = [
                show([one for one in runs if one.contender == name and one.rate_per_s == rate])
                for rate in rates
            ]
            print(f"{name:26}" + "".join(f"{cell:>9}" for cell in cells))
    _print_ratios(found)


def _print_ratios(found: Mapping[str, Any]) -> None:
    if found.get("highest"):
        print("\nhighest rate inside the SLO, requests/s")
        over = found.get("rate_over", {})
        for name, rates in found["highest"].items():
            note = f"   optimal {over[name]['ratio']:.2f} x it" if name in over else ""
            print(f"{name:26}{mean(rates.values()):9.1f}  ({_spread(list(rates.values()))}){note}")
    if found.get("beyond"):
        one = found["beyond"]
        print(
            f"at {one['rate_per_s']:.1f} requests/s TTFT p95 of loraserve"
            f" {one['loraserve_ttft_p95_ms'] / 1e3:.2f} s, of optimal"
            f" {one['optimal_ttft_p95_ms'] / 1e3:.2f} s: {one['ratio']:.1f} x"
        )
    for row in found["against_best"]:
        worse = "  WORSE" if row["worse"] else ""
        print(
            f"at {row['rate_per_s']:6.1f}: optimal {row['ratio']:.3f} x {row['best_other']}"
            f" [{row['low']:.3f}, {row['high']:.3f}]{worse}"
        )
    for row in found.get("over_scratch", ()):
        moved = "" if row["moved_over_scratch"] is None else f", moved {row['moved_over_scratch']:.2f} x"
        print(
            f"at {row['rate_per_s']:6.1f}: optimal {row['ratio']:.3f} x plans from scratch"
            f" [{row['low']:.3f}, {row['high']:.3f}]{moved}"
        )
    for line in _live_lines(found) if "simulated" in found else ():
        print(line)
    told = {key: value for key, value in found["bytes"].items() if value is not None}
    print(", ".join(f"{key} {value:.2f}" for key, value in told.items()), flush=True)


def _live_lines(found: Mapping[str, Any]) -> list[str]:
    """Live beside simulated, how each run went, and what was void."""
    head = ("TTFT p95, s", "TBT p95, ms", "moved, MiB", "pacing p99, ms", "steps, x", "busy, %")
    lines = ["", f"{'live and simulated':39}" + "".join(f"{one:>16}" for one in head)]
    for one, other, how in zip(found["runs"], found["simulated"], found["measured"], strict=True):
        cells = (
            f"{one.ttft_p95_ms / 1e3:.2f} {other.ttft_p95_ms / 1e3:.2f}",
            f"{one.tbt_p95_ms:.0f} {other.tbt_p95_ms:.0f}",
            f"{one.bytes_moved / MIB:.0f} {other.bytes_moved / MIB:.0f}",
            f"{how.pacing_p99_ms:.1f}",
            "-" if how.step_factor is None else f"{how.step_factor:.3f}",
            f"{100 * how.busy:.0f}",
        )
        who = f"{one.contender:24}{one.rate_per_s:6.1f}/s seed {one.seed}"
        changed = " > ".join(",".join(map(str, each)) for each in how.settings)
        lines.append(
            f"{who:39}"
            + "".join(f"{cell:>16}" for cell in cells)
            + ("  " + changed) * (len(how.settings) > 1)
        )
    return lines + [f"void: {line}" for line in found["void"]]


def _spread(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _seconds(value_ms: float) -> str:
    return "-" if math.isinf(value_ms) else f"{value_ms / 1e3:.2f}"


def _meant(values: Sequence[float], digits: int = 0) -> str:
    return f"{mean(values):,.{digits}f}" if values else "-"


_TABLES: Mapping[str, Callable[[Sequence[Outcome]], str]] = {
    "TTFT p95, s (geometric mean of the seeds)": lambda runs: _seconds(
        level([one.ttft_p95_ms for one in runs])
    ),
    "TTFT p50, s": lambda runs: _seconds(level([one.ttft_p50_ms for one in runs])),
    "TTFT p99, s": lambda runs: _seconds(level([one.ttft_p99_ms for one in runs])),
    "TBT p95, ms": lambda runs: _meant([one.tbt_p95_ms for one in runs]),
    "attainment, %": lambda runs: _meant([100 * one.attainment for one in runs], 1),
    "failed": lambda runs: _meant([one.failed for one in runs], 1),
    "moved, MiB": lambda runs: _meant([one.bytes_moved / MIB for one in runs]),
    "held, MiB": lambda runs: _meant([one.resident_bytes / MIB for one in runs]),
    "cold misses": lambda runs: _meant([one.cold_misses for one in runs], 1),
}


def write(folder: Path, runs: Sequence[Outcome]) -> None:
    """`runs.csv`, `runs.parquet` and a picture of TTFT p95 over the rate for each fleet and workload."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Outcome)]
    rows = [asdict(one) for one in runs]
    with (folder / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
    _write_parquet(folder / "runs.parquet", rows, names)
    for fleet, workload in dict.fromkeys((one.fleet, one.workload) for one in runs):
        chosen = [one for one in runs if (one.fleet, one.workload) == (fleet, workload)]
        _draw(folder / f"ttft-{fleet}-{workload}.png", chosen, f"{fleet}, {workload}")


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), path)


def _draw(path: Path, runs: Sequence[Outcome], title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = sorted({one.rate_per_s for one in runs})
    for name in dict.fromkeys(one.contender for one in runs):
        by_rate = [
            [one.ttft_p95_ms for one in runs if one.contender == name and one.rate_per_s == rate]
            for rate in rates
        ]
        seen = [(rate, level(values) / 1e3) for rate, values in zip(rates, by_rate, strict=True) if values]
        shown = [(rate, min(value, _TOP_S)) for rate, value in seen]
        wide = 2.6 if name == "optimal" else 1.3
        axes.plot(*zip(*shown, strict=True), marker="o", markersize=3, linewidth=wide, label=name)
    axes.axhline(2.0, color="#667079", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("requests/s")
    axes.set_ylabel("TTFT p95, s")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(visible=True, which="major", color="#dfe3e6", linewidth=0.6)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path)
