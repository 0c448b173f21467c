"""How much processor time each part of a run took, from /proc."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OTHERS = "others"
"""What runs on the machine and is no part of the comparison."""

CLIENT = "client"

Roles = Callable[[], Mapping[str, Sequence[int]]]
"""The processes of each part, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorUse:
    """Processors busy on average with each part, over `wall_s`, of the `processors` there are."""

    processors: int
    wall_s: float
    busy: Mapping[str, float]

    @property
    def others(self) -> float:
        """What was no part of the comparison, as a share of the machine."""
        return self.busy.get(OTHERS, 0.0) / self.processors

    @property
    def total(self) -> float:
        """All parts together, as a share of the machine."""
        return sum(self.busy.values()) / self.processors


class ProcessorMeter:
    """Counts from when it is made; processes that end in between are lost to `others`."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._begun_s = time.monotonic()
        self._parts = self._parts_s()
        self._machine = machine_s()

    def use(self) -> ProcessorUse:
        """The use since the meter was made."""
        wall_s = max(time.monotonic() - self._begun_s, 1e-9)
        busy = {
            name: max(0.0, spent_s - self._parts.get(name, 0.0)) / wall_s
            for name, spent_s in self._parts_s().items()
        }
        busy[OTHERS] = max(0.0, (machine_s() - self._machine) / wall_s - sum(busy.values()))
        return ProcessorUse(processors=os.cpu_count() or 1, wall_s=wall_s, busy=busy)

    def _parts_s(self) -> dict[str, float]:
        parts = {name: sum(process_s(pid) for pid in pids) for name, pids in self._roles().items()}
        parts[CLIENT] = process_s(os.getpid())
        return parts


def process_s(pid: int) -> float:
    """Processor seconds of a process so far, user and system; 0 for one that has ended."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _ticks_per_s()
    return 0.0


def machine_s() -> float:
    """Processor seconds that the machine has been busy so far."""
    with contextlib.suppress(OSError):
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
        # user, nice, system, then idle and iowait, which are no work, then irq and softirq.
        user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[1:8])
        return (user + nice + system + irq + softirq) / _ticks_per_s()
    return 0.0


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK")
