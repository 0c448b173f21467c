"""How busy the processors were with other work while something was measured.

Linux only: elsewhere nothing is known.
"""

import os
from collections.abc import Iterable
from pathlib import Path

# Of /proc/stat: user, nice, system, irq, softirq, steal; idle and iowait are no work.
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)


class Bystanders:
    """The processor time that neither this process nor these others of ours have used since it was made."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = (os.getpid(), *pids)
        self._before = self._read()

    def share(self) -> float | None:
        """Of all processors' time, 0 to 1; what the hypervisor took counts as used by others. None where it
        cannot be known, or one of the processes has ended."""
        after = self._read()
        if self._before is None or after is None:
            return None
        busy, own, total = (new - old for old, new in zip(self._before, after, strict=True))
        return round(max(0.0, busy - own) / total, 4) if total > 0 else None

    def _read(self) -> tuple[int, int, int] | None:
        """Ticks since the machine started: busy, ours, all."""
        try:
            whole = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
            own = sum(_ticks(pid) for pid in self._pids)
        except (OSError, IndexError):
            return None
        # Guests are counted within user and nice.
        return sum(int(whole[field]) for field in _BUSY_FIELDS), own, sum(map(int, whole[1:9]))


def _ticks(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
