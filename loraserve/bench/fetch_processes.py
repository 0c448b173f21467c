"""The processes of `bench fetch` as the one that measures sees them."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from loraserve.bench.fetch_subject import FetchSubject
from loraserve.errors import WorkFailedError

ANSWER_TIMEOUT_S = 300.0
_CLOSE_TIMEOUT_S = 30.0
_MAX_LINE_BYTES = 2**20
_MAX_COMPLAINT = 300

Peers = Sequence[tuple[str, str, str]]
"""Name, scheme and address (hex) of those to fetch from."""


class WorkerProcess:
    """One `loraserve.bench.fetch_worker`; asks one thing at a time."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
        self._process = process
        self._name = name
        self._log = log
        self._asking = asyncio.Lock()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Its answer; WorkFailedError if it fails, dies or says nothing for `ANSWER_TIMEOUT_S`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._asking:
            try:
                self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                await self._process.stdin.drain()
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    line = await self._process.stdout.readline()
            except TimeoutError:
                raise WorkFailedError(f"the {self._name} said nothing for {ANSWER_TIMEOUT_S:g} s") from None
            except ConnectionError:
                line = b""
        if not line:
            raise WorkFailedError(f"the {self._name} has ended: {self._complaint()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkFailedError(f"the {self._name}: {answer['error']}")
        return answer

    async def close(self) -> None:
        """End it: its input ends, and if it does not follow it is killed."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _complaint(self) -> str:
        """The last line that it wrote to its standard error."""
        with suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((one.strip() for one in reversed(lines) if one.strip()), "")[:_MAX_COMPLAINT]
        return ""


@asynccontextmanager
async def worker(name: str, folder: Path, *, prefix: Sequence[str] = ()) -> AsyncIterator[WorkerProcess]:
    """A process that is ended with the `with`; `prefix` is a command that runs it elsewhere."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *prefix,
            *(sys.executable, "-m", "loraserve.bench.fetch_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=_MAX_LINE_BYTES,
            # Ctrl-C is for the one that measures, which ends the others in order.
            start_new_session=True,
        )
    started = WorkerProcess(process, name, log)
    try:
        yield started
    finally:
        await asyncio.shield(started.close())


def wanted_tree(
    subject: FetchSubject, *, directory: Path | None = None, peers: Peers = (), is_plain: bool = False
) -> Mapping[str, Any]:
    """What a worker is to fetch, for JSON; `is_plain`: a folder of which nobody knows a digest."""
    return {
        "version": str(subject.version),
        "digest": "" if is_plain else subject.digest,
        "head_sha256": "" if is_plain else subject.head_sha256,
        "rank": subject.shape.rank,
        "size_bytes": subject.body_bytes,
        "directory": str(directory) if directory else "",
        "peers": [list(one) for one in peers],
    }
