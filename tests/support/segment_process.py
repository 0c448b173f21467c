"""Another process beside an adapter's segment: the one that owns it, or one that only reaches it.

`own FOLDER NAME` builds one, prints the reference and stays. `reach REFERENCE` tries to change it and prints
what it was refused with, then maps and checks it and prints its modules, now and after a line on its input.
"""

import dataclasses
import json
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

from loraserve.adapters.segment import SegmentRef, build_segment, map_segment


def tampering(fd: int, size_bytes: int) -> dict[str, Callable[[], object]]:
    """Ways to change a segment through a descriptor."""
    return {
        "write": lambda: os.pwrite(fd, b"x", size_bytes - 1),
        "shrink": lambda: os.ftruncate(fd, size_bytes - 1),
        "grow": lambda: os.ftruncate(fd, size_bytes + 1),
        "map": lambda: mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE),
        "punch": lambda: os.posix_fallocate(fd, 0, size_bytes + 1),
    }


def refused(fd: int, size_bytes: int) -> dict[str, str]:
    """What each way was refused with; '' if it was not."""
    found = {}
    for name, change in tampering(fd, size_bytes).items():
        try:
            change()
        except OSError as error:
            found[name] = type(error).__name__
        else:
            found[name] = ""
    return found


def main() -> None:
    """One line of JSON per step."""
    what, *arguments = sys.argv[1:]
    if what == "own":
        folder, name = arguments
        segment = build_segment(Path(folder), name=name, digest=None, max_lora_rank=64)
        print(json.dumps(dataclasses.asdict(segment.ref)), flush=True)
        sys.stdin.readline()
        return
    ref = SegmentRef(**json.loads(arguments[0]))
    fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_RDWR)
    print(json.dumps(refused(fd, ref.size_bytes)), flush=True)
    os.close(fd)
    mapped = map_segment(ref)
    mapped.verify()
    print(json.dumps(sorted(mapped.modules)), flush=True)
    sys.stdin.readline()
    mapped.verify()
    print(json.dumps(sorted(mapped.modules)), flush=True)


if __name__ == "__main__":
    main()
