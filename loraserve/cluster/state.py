"""Where a cluster of this machine keeps its files, and how the command line finds it again.

One folder per cluster: `cluster.json` while it runs, `controller.sqlite` and `adapters/` for as long as
the operator wants to keep them, `logs/` of the last run.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from loraserve.errors import NotFoundError
from loraserve.folders import cache_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """A running cluster. `run_id` is in the environment of each of its processes; `ready` is False
    while it is still starting; `temp_dir` holds Ray's session and all temporary files, and goes with it.
    `ray_goes_on` in a Ray cluster that was there before and stays, once the name was found free there."""

    name: str
    run_id: str
    head_pid: int
    head_start_ticks: int
    controller_address: str = ""
    router_addresses: tuple[str, ...] = ()
    ray_address: str = ""
    ray_goes_on: bool = False
    temp_dir: str = ""
    ready: bool = False


def cluster_dir(name: str, state_dir: str = "") -> Path:
    """The folder of the cluster of this name."""
    return Path(state_dir).resolve() / name if state_dir else cache_dir() / "clusters" / name


def write_running(folder: Path, running: RunningCluster) -> None:
    """Replace cluster.json in one step."""
    scratch = folder / "cluster.json.new"
    scratch.write_text(json.dumps(asdict(running), indent=2), encoding="utf-8")
    scratch.replace(folder / "cluster.json")


def read_running(folder: Path) -> RunningCluster | None:
    """The cluster that this folder's cluster.json describes, whether or not it is still alive."""
    try:
        return msgspec.json.decode((folder / "cluster.json").read_bytes(), type=RunningCluster)
    except (OSError, msgspec.DecodeError):
        return None


def start_ticks(pid: int) -> int | None:
    """When a live process was started, in clock ticks since boot: with the pid, its identity."""
    try:
        # Bytes: a process may call itself what is not valid text.
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] == b"Z" else int(fields[19])


def is_alive(running: RunningCluster) -> bool:
    """Whether the head process of the cluster is still the one that was started."""
    return start_ticks(running.head_pid) == running.head_start_ticks


def router_addresses(name: str, state_dir: str = "") -> tuple[str, ...]:
    """The routers of the running cluster of this name; NotFoundError if none runs."""
    running = read_running(cluster_dir(name, state_dir))
    if running is None or not is_alive(running):
        raise NotFoundError(
            f"no cluster named {name} is running on this machine; start one with `loraserve up`,"
            " or give a router's --address"
        )
    if not running.router_addresses:
        raise NotFoundError(f"cluster {name} is still starting; wait until its `loraserve up` has returned")
    return running.router_addresses
