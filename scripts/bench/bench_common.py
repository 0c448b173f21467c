"""What the benchmarks share: their command line, what their figures hold for, clusters of their own."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from loraserve.cluster.state import RunningCluster, cluster_dir, read_running

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def parser(name: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """The command line of `scripts/bench/NAME`, with --json and --quick, whose help is `quick`."""
    made = argparse.ArgumentParser(
        prog=f"scripts/bench/{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print one JSON object last")
    made.add_argument("--quick", action="store_true", help=quick)
    return made


def at_least_one(text: str) -> int:
    """An argument that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """An argument that is a time, more than none."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return value


def conditions(name: str, **own: object) -> dict[str, Any]:
    """What the figures of `scripts/bench/NAME` hold for."""
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **own,
        "command": " ".join([f"scripts/bench/{name}", *sys.argv[1:]]),
    }


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def end_in_order_when_told() -> None:
    """Turn SIGTERM into an exception, so that what was started is ended."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit("ended by SIGTERM")

    signal.signal(signal.SIGTERM, stop)


def loraserve(name: str, *arguments: str) -> dict[str, Any]:
    """Run a command of the service for `scripts/bench/NAME`; its JSON answer."""
    done = subprocess.run(
        [sys.executable, "-m", "loraserve.cli.main", *arguments, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: loraserve {' '.join(arguments)} failed")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextmanager
def cluster(name: str, config: str) -> Iterator[tuple[RunningCluster, Path]]:
    """A cluster of `scripts/bench/NAME` and its configuration file; ended whatever happens.

    `config` is TOML with {cluster} where the cluster's name goes.
    """
    own = f"{name}-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.toml"
        file.write_text(config.replace("{cluster}", own), encoding="utf-8")
        try:
            loraserve(name, "up", "--config", str(file), "--fresh")
            running = read_running(cluster_dir(own))
            if running is None:
                raise SystemExit(f"{name}: cluster {own} is gone")
            yield running, file
        finally:
            loraserve(name, "down", "--cluster", own)
