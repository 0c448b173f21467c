"""What every command shares: errors as one line and an exit code, JSON output, an event loop.

Exit codes: 0 done, 1 the work failed, 2 bad input, 130 interrupted.
"""

import dataclasses
import enum
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from loraserve.cluster.addresses import split_address
from loraserve.errors import BadInputError, LoraServeError

if TYPE_CHECKING:
    import typer

P = ParamSpec("P")
T = TypeVar("T")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one line on stderr and the exit code that stands for them."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BadInputError as error:
            fail(str(error), EXIT_BAD_INPUT)
        except LoraServeError as error:
            fail(str(error), EXIT_FAILED)
        except KeyboardInterrupt:
            fail("interrupted", EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader has gone; Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(EXIT_FAILED) from None

    return wrapped


def given_options(context: "typer.Context") -> frozenset[str]:
    """The parameters of a command that stand on its command line, by their Python names."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the command as Ctrl-C does: in order, with nothing half done left behind."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str, exit_code: int) -> None:
    """One line on stderr, then SystemExit."""
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(exit_code)


def echo_json(value: object) -> None:
    """One JSON object on one line of stdout; what JSON has no number for is null."""
    print(json.dumps(plain(value), allow_nan=False, ensure_ascii=False), flush=True)


def plain(value: object) -> Any:
    """The value as JSON types: dataclasses as objects, enums as their values, non-finite floats as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    return str(value)


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function on uvloop."""
    import uvloop

    result: T = uvloop.run(main())
    return result


async def until_interrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await the work; SIGINT and SIGTERM cancel it, so that it ends what it has started."""
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def quiet_engine() -> None:
    """vLLM logs hundreds of lines for each engine; its errors come as exceptions."""
    import logging

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.WARNING)


def resolve_addresses(given: Sequence[str] | None, cluster: str) -> tuple[str, ...]:
    """The given addresses, each of which may be several with commas between, or those of all routers of
    the running cluster."""
    if not given:
        from loraserve.cluster.state import router_addresses

        return router_addresses(cluster)
    addresses = tuple(one.strip() for text in given for one in text.split(","))
    for address in addresses:
        if split_address(address) is None:
            raise BadInputError(f"--address: {address} is not HOST:PORT, such as 127.0.0.1:50051")
    return addresses
