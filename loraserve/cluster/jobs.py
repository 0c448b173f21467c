"""Ray jobs: submitting one to a Ray cluster's job server, following its log, and how it ended."""

import os
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, Queue
from typing import Any, NoReturn, TypeVar

from loraserve.cluster.addresses import split_address
from loraserve.cluster.ray_session import TOKEN_VARIABLES, read_token, token_environment
from loraserve.errors import BadInputError, LoraServeError, UnavailableError, WorkFailedError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray's own client waits for an answer without a bound.
CALL_TIMEOUT_S = 60.0
POLL_S = 0.5
# A job's log ends up to this long before its status says so.
END_TIMEOUT_S = 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job ended: Ray's status in lower case, the command's exit code (1 for none), Ray's message."""

    job_id: str
    status: str
    exit_code: int
    message: str


class Jobs:
    """The job server of one Ray cluster, by its HTTP address."""

    def __init__(self, address: str) -> None:
        """UnavailableError if nothing answers there, BadInputError if it wants another token or the address
        is none."""
        _check_address(address)
        # Ray reads the environment when it is imported.
        os.environ.update(token_environment(os.environ))
        self.address = address
        self._client: Any = self._bounded(lambda: _connect(address))

    def submit(
        self, command: Sequence[str], *, folder: str, environment: Mapping[str, str], kind: str
    ) -> str:
        """Start the command in `folder`, as the Ray cluster sees it; the job's id."""
        job_id = f"loraserve-{kind}-{secrets.token_hex(4)}"
        # Ray hands the line to a shell; without `exec` its signals would end that alone.
        line = f"cd {shlex.quote(folder)} && exec {shlex.join(command)}"
        self._bounded(
            lambda: self._client.submit_job(
                entrypoint=line, submission_id=job_id, runtime_env={"env_vars": dict(environment)}
            )
        )
        return job_id

    def follow(self, job_id: str, write: Callable[[str], None]) -> JobEnd:
        """Pass the job's log on as it grows until the job has ended."""
        while True:
            error = self._tail(job_id, write)
            if error is not None:
                raise UnavailableError(
                    f"the log of job {job_id} broke off: {_first_line(error)}; the job itself goes on"
                ) from error
            deadline_s = time.monotonic() + END_TIMEOUT_S
            while time.monotonic() < deadline_s:
                info = self._bounded(lambda: self._client.get_job_info(job_id))
                if info.status.is_terminal():
                    return _end(job_id, info)
                time.sleep(POLL_S)

    def _tail(self, job_id: str, write: Callable[[str], None]) -> Exception | None:
        """Pass the log on until Ray ends it; the error that ended it, if one did.

        In a thread of its own: where it is interrupted, Ray's reader may take the interruption for the
        end of one read and go on.
        """
        import asyncio

        ends: Queue[Exception | None] = Queue()
        wanted = threading.Event()
        wanted.set()

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                if wanted.is_set():
                    write(text)

        def work() -> None:
            try:
                asyncio.run(tail())
                ends.put(None)
            except Exception as error:
                ends.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return ends.get()
        finally:
            wanted.clear()

    def _bounded(self, call: Callable[[], T]) -> T:
        """Run one of Ray's calls, which have no timeout, in a thread that may be left behind."""
        answers: Queue[Callable[[], T]] = Queue()

        def work() -> None:
            try:
                result = call()
                answers.put(lambda: result)
            except Exception as error:
                answers.put(partial(_raise, _explained(error, self.address), error))

        threading.Thread(target=work, daemon=True).start()
        try:
            answer = answers.get(timeout=CALL_TIMEOUT_S)
        except Empty:
            raise UnavailableError(
                f"the Ray job server at {self.address} did not answer within {CALL_TIMEOUT_S:.0f} s; its log"
                " is dashboard.log in Ray's session folder"
            ) from None
        return answer()


def default_address() -> str:
    """Ray's own variable for it, or where Ray's dashboard listens if nothing is said."""
    return os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)


def _raise(error: LoraServeError, cause: Exception) -> NoReturn:
    raise error from cause


def _check_address(address: str) -> None:
    """Refuse what Ray would look up in other ways, or not understand."""
    scheme, _, rest = address.partition("://")
    place = rest.partition("/")[0]
    is_place = split_address(place if ":" in place else f"{place}:80") is not None
    if scheme not in ("http", "https") or not is_place:
        raise BadInputError(
            f"--ray-address: {address} is not the address of a Ray job server, such as {DEFAULT_ADDRESS}"
        )


def _connect(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    client: Any = JobSubmissionClient(address)
    client.list_jobs()
    return client


def _end(job_id: str, info: Any) -> JobEnd:
    status = str(info.status.value).lower()
    code = 0 if status == "succeeded" else info.driver_exit_code or 1
    return JobEnd(
        job_id=job_id,
        status=status,
        # A command that a signal has ended, as a shell would say it.
        exit_code=code if code >= 0 else 128 - code,
        message=" ".join((info.message or "").split()),
    )


def _explained(error: Exception, address: str) -> LoraServeError:
    if type(error).__name__ == "AuthenticationError":
        found = "none was found" if read_token(os.environ) is None else "it refuses the one that was found"
        return BadInputError(
            f"the Ray cluster at {address} wants a token and {found}; set {TOKEN_VARIABLES} to that cluster's"
        )
    if isinstance(error, ConnectionError):
        return UnavailableError(
            f"no Ray job server answers at {address}; start Ray with its dashboard (`ray start --head`), or"
            " give its --ray-address, http://HOST:PORT"
        )
    return WorkFailedError(f"Ray job server at {address}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
