"""Running the command line as a user does: another process, its output and its exit code."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from typing import Any

CODE = "from loraserve.cli.main import run; run()"
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The one JSON object on stdout; fails if there is anything else."""
        return json.loads(self.stdout)


async def start_cli(*arguments: str) -> Process:
    """A running command; end it with `finish_cli`."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", CODE, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )


async def finish_cli(process: Process, stdin: str = "") -> Ran:
    """Wait for the end; a command that does not end is killed and is a TimeoutError."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate(stdin.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ran(exit_code=process.returncode, stdout=stdout.decode(), stderr=stderr.decode())


async def run_cli(*arguments: str, stdin: str = "") -> Ran:
    """Run one command to its end."""
    return await finish_cli(await start_cli(*arguments), stdin)
