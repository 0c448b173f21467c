"""A replica's fabric in a process of its own, for tests that end it.

Arguments: a transport's scheme, then folder, version and digest of each adapter. Takes the adapters from
their folders, prints its address in hex, and serves until its standard input ends.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
def other_process(*wanted: Wanted, scheme: str = "tcp") -> Iterator[OtherProcess]:
    """A process that has these versions; it ends with the block, in whatever state it is."""
    adapters = [text for one in wanted for text in (str(one.directory), one.version_id, one.digest)]
    command = [sys.executable, "-m", __name__, scheme, *adapters]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            address = bytes.fromhex(process.stdout.readline())
            assert address, "the process did not start"
            peer = PeerAddress(replica_id=f"pid-{process.pid}", addresses=((scheme, address),))
            yield OtherProcess(process, peer)
        finally:
            process.kill()


async def _serve(scheme: str, adapters: Sequence[str]) -> None:
    opened = open_transports([scheme], host="127.0.0.1")
    fabric = Fabric(opened.transports, capacity_bytes=2**30)
    for folder, version, digest in zip(*(adapters[which::3] for which in range(3)), strict=True):
        wanted = Wanted(
            version_id=VersionId(version), digest=digest, rank=1, size_bytes=0, directory=Path(folder)
        )
        await fabric.acquire(wanted)
    print(fabric.addresses[0][1].hex(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await fabric.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2:]))
