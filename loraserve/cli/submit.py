"""`loraserve submit`: run the service, or a replay, as a Ray job."""

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraserve.cli.common import EXIT_INTERRUPTED, command, echo_json
from loraserve.errors import BadInputError, WorkFailedError

if TYPE_CHECKING:
    from loraserve.cluster.jobs import Jobs

KINDS = ("up", "replay")


@command
def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="up|replay ...", help="A loraserve command with its options, run where Ray's head is."
        ),
    ],
    ray_address: str = typer.Option(
        None, help="Ray's job server. [default: RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265]"
    ),
    no_wait: bool = typer.Option(False, "--no-wait", help="Return once the job is submitted."),
    python: str = typer.Option(None, help="The Python to run it with there. [default: this one]"),
    json: bool = typer.Option(False, "--json", help="Print one JSON object; the job's log to stderr."),
) -> None:
    """Run `up` or `replay` as a Ray job and follow its log; the exit code is the job's."""
    from loraserve.cluster.jobs import Jobs, default_address
    from loraserve.folders import cache_dir

    kind = arguments[0]
    if kind not in KINDS:
        raise BadInputError(f"submit: {kind} cannot run as a job; what can: {', '.join(KINDS)}")
    jobs = Jobs(ray_address or default_address())
    job_id = jobs.submit(
        _command(arguments, python or sys.executable, json=json),
        folder=str(Path.cwd()),
        environment={"LORASERVE_CACHE_DIR": str(cache_dir().resolve())},
        kind=kind,
    )
    if no_wait:
        if json:
            echo_json({"job_id": job_id, "ray_address": jobs.address})
        else:
            print(f"submitted job {job_id}\n{_hints(job_id, jobs.address)}")
        return
    print(f"submitted job {job_id}", file=sys.stderr, flush=True)
    _follow(jobs, job_id, json=json)


def _command(arguments: list[str], python: str, *, json: bool) -> list[str]:
    kind, *rest = arguments
    # The service stays as long as its job, in the Ray cluster that runs the job.
    first = ["--foreground", "--ray-address", "auto"] if kind == "up" else []
    last = ["--json"] if json and "--json" not in rest else []
    return [python, "-m", "loraserve.cli.main", kind, *first, *rest, *last]


def _follow(jobs: "Jobs", job_id: str, *, json: bool) -> None:
    """Pass the log on; SystemExit with the job's exit code, WorkFailedError if it was stopped."""
    result: dict[str, Any] | None = None
    target = sys.stderr if json else sys.stdout

    def write(text: str) -> None:
        nonlocal result
        target.write(text)
        target.flush()
        result = _last_object(text) or result

    try:
        end = jobs.follow(job_id, write)
    except KeyboardInterrupt:
        print(
            f"\nno longer following job {job_id}, which goes on\n{_hints(job_id, jobs.address)}",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_INTERRUPTED) from None
    if json:
        echo_json({"job_id": job_id, "status": end.status, "exit_code": end.exit_code, "result": result})
    if end.status == "stopped":
        raise WorkFailedError(f"job {job_id} was stopped")
    if end.exit_code:
        print(f"job {job_id} {end.status}: {end.message}", file=sys.stderr)
        raise SystemExit(end.exit_code)


def _hints(job_id: str, address: str) -> str:
    return (
        f"  follow it:  ray job logs --follow --address {address} {job_id}\n"
        f"  stop it:    ray job stop --address {address} {job_id}"
    )


def _last_object(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                value = json_format.loads(line)
            except ValueError:
                continue
            return value if isinstance(value, dict) else None
    return None
