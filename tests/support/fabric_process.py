"""A replica's fabric in a process of its own, over tcp, for tests that end it.

Arguments: folder, version, digest. Takes the adapter from the folder, prints its address in hex, and serves
until its standard input ends.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import PeerAddress, Wanted
from loraserve.transport.registry import open_transports
from placement.types import VersionId

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class OtherProcess:
    """The process, and how its fabric is reached."""

    process: "subprocess.Popen[str]"
    peer: PeerAddress


@contextmanager
def other_process(wanted: Wanted) -> Iterator[OtherProcess]:
    """A process that has this version; it ends with the block, in whatever state it is."""
    command = [sys.executable, "-m", __name__, str(wanted.directory), wanted.version_id, wanted.digest]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            address = bytes.fromhex(process.stdout.readline())
            assert address, "the process did not start"
            peer = PeerAddress(replica_id=f"pid-{process.pid}", addresses=(("tcp", address),))
            yield OtherProcess(process, peer)
        finally:
            process.kill()


async def _serve(folder: Path, version: str, digest: str) -> None:
    opened = open_transports(["tcp"], host="127.0.0.1")
    fabric = Fabric(opened.transports, capacity_bytes=2**30)
    wanted = Wanted(version_id=VersionId(version), digest=digest, rank=4, size_bytes=0, directory=folder)
    await fabric.acquire(wanted)
    print(fabric.addresses[0][1].hex(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await fabric.close()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
