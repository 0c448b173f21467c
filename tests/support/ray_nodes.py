"""A Ray cluster of several nodes on this machine, for tests: each node at a loopback address of its own.

A process of its own holds the nodes, with a token; they end with it, and it ends with its input.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.cluster.processes import RUN_ID_VARIABLE, end_processes, processes_of

OBJECT_STORE_BYTES = 78_643_200
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNodes:
    """The cluster's address, its dashboard ('' without one), and what a process needs to reach them."""

    address: str
    dashboard: str
    environment: Mapping[str, str]
    holder: "subprocess.Popen[str]"

    def add(self, host: str, cpus: int) -> None:
        """Start a node and wait until the cluster knows it."""
        _ask(self.holder, {"add": host, "cpus": cpus})

    def kill(self, host: str) -> None:
        """SIGKILL for the node's daemons, of which its workers die."""
        _ask(self.holder, {"kill": host})

    def leftovers(self, cluster: str) -> dict[str, int]:
        """End what a cluster of ours has left there; how many actors and groups that were."""
        done = subprocess.run(
            [sys.executable, "-m", "loraserve.cluster.sweep", self.address, cluster],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=STOP_TIMEOUT_S,
            check=True,
        )
        left: dict[str, int] = json.loads(done.stdout)
        return left


@contextmanager
def ray_nodes(folder: Path, *, cpus: int, dashboard: bool = False) -> Iterator[RayNodes]:
    """A Ray cluster with a head node at 127.0.0.2; at the end none of its processes is left."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    run_id = secrets.token_hex(8)
    # Ray's sockets want a short path.
    short = Path(f"/tmp/lst-{run_id}")
    (short / "ray").mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_nodes", str(cpus), str(int(dashboard))],
        env={
            **os.environ,
            **environment,
            RUN_ID_VARIABLE: run_id,
            "RAY_TMPDIR": str(short),
            # A dead node is to be noticed in seconds.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        with holder:
            started = _answer(holder)
            try:
                yield RayNodes(environment=environment, holder=holder, **started)
            finally:
                assert holder.stdin is not None
                holder.stdin.close()
                try:
                    holder.wait(STOP_TIMEOUT_S)
                finally:
                    # Without effect on one that has ended; leaving the block waits for it without a bound.
                    holder.kill()
        assert _left(run_id) == []
    finally:
        end_processes(run_id, grace_s=0.0)
        subprocess.run(["rm", "-rf", str(short)], check=True)


def _left(run_id: str) -> list[str]:
    """What is still there of the cluster once its last processes have had time to end."""
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while (pids := processes_of(run_id)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids]


def _ask(holder: "subprocess.Popen[str]", order: dict[str, Any]) -> None:
    assert holder.stdin is not None
    holder.stdin.write(json.dumps(order) + "\n")
    holder.stdin.flush()
    _answer(holder)


def _answer(holder: "subprocess.Popen[str]") -> dict[str, Any]:
    assert holder.stdout is not None
    line = holder.stdout.readline()
    assert line, "the process that holds the Ray cluster has died"
    answer: dict[str, Any] = json.loads(line)
    return answer


def hold(cpus: int, *, dashboard: bool) -> None:
    """Start the head node, take orders from standard input, end all nodes with it."""
    from ray.cluster_utils import Cluster

    from loraserve.cluster.head import free_port

    # Ray's daemons must not hold the pipe of the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    common = {"object_store_memory": OBJECT_STORE_BYTES}
    extra = {"dashboard_port": free_port("127.0.0.1")} if dashboard else {}
    head = {
        **common,
        **extra,
        "include_dashboard": dashboard,
        "node_ip_address": "127.0.0.2",
        "num_cpus": cpus,
    }
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)

    def say(answer: dict[str, str]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    url = f"http://{cluster.webui_url}" if dashboard else ""
    say({"address": cluster.address, "dashboard": url})
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "add" in order:
            host = order["add"]
            nodes[host] = cluster.add_node(**common, node_ip_address=host, num_cpus=order["cpus"])
        else:
            cluster.remove_node(nodes.pop(order["kill"]), allow_graceful=False)
        say({})
    cluster.shutdown()


if __name__ == "__main__":
    hold(int(sys.argv[1]), dashboard=bool(int(sys.argv[2])))
