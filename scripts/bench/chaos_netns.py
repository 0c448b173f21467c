"""A router in a network namespace of its own, whose links can be cut.

The namespace has two links. One leads to clients. The other leads to the services of this machine's
loopback address: the namespace's own loopback device stays down and the kernel is told to route
127.0.0.1 over the link (`route_localnet`), so that the router finds controller and replicas at the very
addresses that the routing table names. A link that is set down loses packets in silence, as a pulled
cable does.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROUTER_ID = "router-apart"
START_TIMEOUT_S = 60.0


def why_not() -> str:
    """Why no namespace can be made here; '' if one can."""
    if shutil.which("ip") is None:
        return "no `ip` program here"
    name = f"lschaos-try-{os.getpid()}"
    made = _run("ip", "netns", "add", name, check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _run("ip", "netns", "del", name, check=False)
    return ""


class ApartRouter:
    """`python -m loraserve.router` in its namespace; `close` takes everything away again."""

    CLIENTS, CLUSTER = "c", "r"
    """The links: to clients, and to controller and replicas."""

    def __init__(self, *, controller: str, cluster: str, config: Path, log: Path, run_id: str) -> None:
        self._name = f"lschaos-{os.getpid()}"
        self._device = f"lsc{os.getpid()}"
        third = os.getpid() % 250
        # From the range that is set apart for tests of networks.
        self._hosts = {
            self.CLIENTS: (f"198.18.{third}.1", f"198.18.{third}.2"),
            self.CLUSTER: (f"198.18.{third}.5", f"198.18.{third}.6"),
        }
        self._command = [
            *("ip", "netns", "exec", self._name, sys.executable, "-m", "loraserve.router"),
            *("--controller", controller, "--cluster", cluster, "--config", str(config)),
            *("--router-id", ROUTER_ID, "--insecure-listen", "--host", self._hosts[self.CLIENTS][1]),
        ]
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._environment = {**os.environ, "LORASERVE_RUN_ID": run_id}
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """Where clients find it, the same after each start."""
        return f"{self._hosts[self.CLIENTS][1]}:{self._port}"

    def make(self) -> None:
        """Make the namespace and start the router; the port is picked once."""
        _run("ip", "netns", "add", self._name)
        for link, (outside, inside) in self._hosts.items():
            out, into = self._outside(link), f"{self._device}{link}1"
            _run("ip", "link", "add", out, "type", "veth", "peer", "name", into)
            _run("ip", "link", "set", into, "netns", self._name)
            _run("ip", "addr", "add", f"{outside}/30", "dev", out)
            _run("ip", "link", "set", out, "up")
            self._inside("ip", "addr", "add", f"{inside}/30", "dev", into)
            self._inside("ip", "link", "set", into, "up")
        out, into = self._outside(self.CLUSTER), f"{self._device}{self.CLUSTER}1"
        outside, inside = self._hosts[self.CLUSTER]
        Path(f"/proc/sys/net/ipv4/conf/{out}/route_localnet").write_text("1", encoding="ascii")
        self._inside("sh", "-c", f"echo 1 >/proc/sys/net/ipv4/conf/{into}/route_localnet")
        self._inside("ip", "route", "add", "127.0.0.1/32", "via", outside, "dev", into, "src", inside)
        self.start()

    def start(self) -> None:
        """Start the router's process, as what supervises it would."""
        if self._log is None:
            self._log = self._log_path.open("ab")
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise SystemExit(f"chaos: the router in its namespace did not start; see {self._log_path}")
        self._port = json.loads(line)["port"]

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def cut(self, link: str) -> None:
        """From now on nothing passes."""
        _run("ip", "link", "set", self._outside(link), "down")

    def restore(self, link: str) -> None:
        """Everything passes again."""
        _run("ip", "link", "set", self._outside(link), "up")

    def close(self) -> None:
        """End the router, delete the namespace and with it its links."""
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        for link in self._hosts:
            _run("ip", "link", "del", self._outside(link), check=False)
        _run("ip", "netns", "del", self._name, check=False)
        if self._log is not None:
            self._log.close()

    def _outside(self, link: str) -> str:
        return f"{self._device}{link}0"

    def _inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._name, *command)


def _run(*command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10.0
    )
    if check and done.returncode != 0:
        raise SystemExit(f"chaos: {_shown(command)} failed: {done.stderr.strip()}")
    return done


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)
