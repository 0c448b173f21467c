"""Two hosts made of network namespaces, with one shaped link between them. Needs root.

tbf shapes what leaves either end; this project's test machines have no netem, so the link has no delay of
its own (what waits in tbf's queue is delayed all the same).
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

BURST_BYTES = 256 * 1024
"""What the link lets through at once after a pause; at least one segment as the kernel hands it over."""
QUEUE_MS = 20
_PREFIX = "lsfetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One of the two; `prefix` runs a command there."""

    address: str
    prefix: tuple[str, ...]


def why_not() -> str:
    """Why no such hosts can be made here; '' if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"no `{program}` program here"
    name = f"{_PREFIX}-{os.getpid()}-t"
    made = _run("ip", "netns", "add", name, check=False)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    try:
        _run("ip", "netns", "exec", name, "ip", "link", "add", "x0", "type", "veth", "peer", "name", "x1")
        shaped = _run(*_in(name), *_shape("x0", 1), check=False)
        return "" if shaped.returncode == 0 else f"links cannot be shaped here: {shaped.stderr.strip()}"
    finally:
        _run("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def two_hosts(gbit_per_s: int) -> Iterator[tuple[Host, Host]]:
    """Both hosts, which are gone with the `with`; those of a bench that was killed go first."""
    _sweep()
    names = [f"{_PREFIX}-{os.getpid()}-{end}" for end in "ab"]
    # From the range that is set apart for tests of networks.
    addresses = [f"198.18.{os.getpid() % 250}.{number}" for number in (9, 10)]
    devices = [f"{_PREFIX}{end}" for end in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        pair = ("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        _run(*_in(names[0]), *pair, "netns", names[1])
        for name, device, address in zip(names, devices, addresses, strict=True):
            _run(*_in(name), "ip", "addr", "add", f"{address}/30", "dev", device)
            _run(*_in(name), "ip", "link", "set", device, "up")
            _run(*_in(name), *_shape(device, gbit_per_s))
        hosts = [
            Host(address=address, prefix=_in(name)) for name, address in zip(names, addresses, strict=True)
        ]
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            _run("ip", "netns", "del", name, check=False)


def _shape(device: str, gbit_per_s: int) -> tuple[str, ...]:
    return (
        *("tc", "qdisc", "add", "dev", device, "root", "tbf"),
        *("rate", f"{gbit_per_s}gbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"),
    )


def namespaces(pid: int | None = None) -> list[str]:
    """The namespaces that a process has now, by default this one."""
    found = [line.split()[0] for line in _run("ip", "netns", "list", check=False).stdout.splitlines()]
    return [name for name in found if name.startswith(f"{_PREFIX}-{pid or os.getpid()}-")]


def _sweep() -> None:
    """Take away the namespaces of processes that were killed."""
    for line in _run("ip", "netns", "list", check=False).stdout.splitlines():
        parts = line.split()[0].split("-")
        if len(parts) == 3 and parts[0] == _PREFIX and not os.path.exists(f"/proc/{parts[1]}"):
            _run("ip", "netns", "del", "-".join(parts), check=False)


def _in(name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name)


def _run(*command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10.0
    )
    if check and done.returncode != 0:
        raise SystemExit(f"fetch: {' '.join(command)} failed: {done.stderr.strip()}")
    return done
