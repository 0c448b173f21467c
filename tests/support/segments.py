"""Who holds an adapter's shared memory, asked of the kernel."""

import contextlib
import os
from pathlib import Path


def holders(version: str, pids: list[int] | None = None) -> set[int]:
    """The processes that have a descriptor or a mapping of the version's segment, of all or of these."""
    found = set()
    for pid in pids or [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        if f"memfd:loraserve-{version}" in _names(Path(f"/proc/{pid}")):
            found.add(pid)
    return found


def own_segments() -> int:
    """How many descriptors of segments this process has."""
    return sum("memfd:loraserve-" in one for one in _links(Path("/proc/self")))


def _names(process: Path) -> str:
    text = "\n".join(_links(process))
    with contextlib.suppress(OSError):  # it ended, or it is another user's
        text += (process / "maps").read_text(encoding="utf-8", errors="replace")
    return text


def _links(process: Path) -> list[str]:
    links = []
    with contextlib.suppress(OSError):
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(entry))
    return links
