"""Two hosts made of network namespaces, with one shaped link between them. Needs root.

Without a delay the link is a veth pair, and tbf shapes what leaves either end. With one it is a process that
forwards packets between two TUN devices (`fetch_delay`): not every kernel has netem.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BURST_BYTES = 256 * 1024
"""What the link lets through at once after a pause; at least one segment as the kernel hands it over."""
QUEUE_MS = 20
_PREFIX = "lsfetch"
_START_TIMEOUT_S = 10.0


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
def two_hosts(gbit_per_s: int, delay_ms: float) -> Iterator[tuple[Host, Host]]:
    """Both hosts, which are gone with the `with`; those of a bench that was killed go first. `delay_ms` is
    that of each direction."""
    _sweep()
    names = [f"{_PREFIX}-{os.getpid()}-{end}" for end in "ab"]
    # From the range that is set apart for tests of networks.
    addresses = [f"198.18.{os.getpid() % 250}.{number}" for number in (9, 10)]
    devices = [f"lsf{os.getpid()}{end}" for end in "ab"]
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name, check=False)
        if delay_ms:
            stack.enter_context(_delayed(devices, names, gbit_per_s, delay_ms))
        else:
            pair = ("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
            _run(*_in(names[0]), *pair, "netns", names[1])
        for name, device, address in zip(names, devices, addresses, strict=True):
            _run(*_in(name), "ip", "addr", "add", f"{address}/30", "dev", device)
            _run(*_in(name), "ip", "link", "set", device, "up")
            if not delay_ms:
                _run(*_in(name), *_shape(device, gbit_per_s))
        hosts = [
            Host(address=address, prefix=_in(name)) for name, address in zip(names, addresses, strict=True)
        ]
        yield hosts[0], hosts[1]


@contextlib.contextmanager
def _delayed(
    devices: Sequence[str], names: Sequence[str], gbit_per_s: int, delay_ms: float
) -> Iterator[None]:
    """A process that forwards between a device in either namespace."""
    bytes_per_s = gbit_per_s * 1e9 / 8
    link = (
        devices[0],
        names[0],
        devices[1],
        names[1],
        bytes_per_s,
        delay_ms / 1e3,
        bytes_per_s * QUEUE_MS / 1e3,
    )
    command = [sys.executable, str(Path(__file__).parent / "fetch_delay.py"), *map(str, link)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
            if not ready or not process.stdout.readline():
                raise SystemExit("fetch: no TUN device can be made here")
            yield
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_START_TIMEOUT_S)
            process.kill()


def has_tun() -> bool:
    """Whether links with a delay can be had."""
    return os.access("/dev/net/tun", os.R_OK | os.W_OK)


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
