"""Process plumbing: logs of actors, and finding and ending what belongs to one cluster."""

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

from loraserve.rpc.tuning import tune_grpc

RUN_ID_VARIABLE = "LORASERVE_RUN_ID"
TAIL_BYTES = 16 * 1024


def redirect_output(log: Path) -> None:
    """Send this process's output, and that of all it starts from now on, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def begin_actor(folder: str, name: str) -> Path:
    """Give an actor's process its own log file in the cluster's folder, whose path is returned, and
    gRPC its settings before anything imports it."""
    tune_grpc()
    log = Path(folder) / "logs" / f"{name}.log"
    redirect_output(log)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    return log


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, or '' if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def processes_of(run_id: str) -> list[int]:
    """The live processes whose environment carries this run's id, the caller aside."""
    needle = f"{RUN_ID_VARIABLE}={run_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # A process may end while it is looked at, or belong to somebody else.
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def titled(run_id: str, title: str) -> list[int]:
    """Those of the run's processes whose command line begins with `title`."""
    found = []
    for pid in processes_of(run_id):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.append(pid)
    return found


def parent_of(pid: int) -> int:
    """The process that started this one; OSError if it is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[1])


def end_processes(run_id: str, grace_s: float) -> int:
    """SIGTERM, then SIGKILL after `grace_s`, for all processes of a run; how many were there."""
    first = processes_of(run_id)
    deadline_s = time.monotonic() + grace_s
    for pid in first:
        _signal(pid, signal.SIGTERM)
    while (left := processes_of(run_id)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for _ in range(20):
        for pid in left:
            _signal(pid, signal.SIGKILL)
        left = processes_of(run_id)
        if not left:
            break
        time.sleep(0.05)
    return len(first)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
