"""One table between the error tree and gRPC's status codes, used in both directions."""

import logging
from types import MappingProxyType
from typing import Any, NoReturn

import grpc

from loraserve.errors import (
    AlreadyExistsError,
    BadInputError,
    DeadlineError,
    EngineDeadError,
    LoraServeError,
    NotFoundError,
    OverloadedError,
    StaleError,
    SupersededError,
    UnavailableError,
    WorkFailedError,
)

logger = logging.getLogger(__name__)

# Most particular class first: the first that an error is an instance of decides.
_CODES: tuple[tuple[type[LoraServeError], grpc.StatusCode], ...] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (BadInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (EngineDeadError, grpc.StatusCode.UNAVAILABLE),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (StaleError, grpc.StatusCode.FAILED_PRECONDITION),
    (SupersededError, grpc.StatusCode.ABORTED),
    (WorkFailedError, grpc.StatusCode.INTERNAL),
)

_ERRORS = MappingProxyType(
    {
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
        grpc.StatusCode.INVALID_ARGUMENT: BadInputError,
        grpc.StatusCode.OUT_OF_RANGE: BadInputError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
        grpc.StatusCode.FAILED_PRECONDITION: StaleError,
        grpc.StatusCode.ABORTED: SupersededError,
    }
)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and message that a client sees; an error of ours speaks for itself, any other is
    INTERNAL under its class's name, so that nothing of the inside leaks."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the work was done"
    return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; the server's log has more"


async def abort_with(
    context: "grpc.aio.ServicerContext[Any, Any]",
    error: BaseException,
    trailing_metadata: tuple[tuple[str, str], ...] = (),
) -> NoReturn:
    """End the call with the error's status; the traceback of an unforeseen error goes to the log."""
    code, message = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        logger.error("a call failed: %s", error, exc_info=error)
    await context.abort(code, message, trailing_metadata)
    raise AssertionError("abort returned")


def error_for(code: grpc.StatusCode, message: str) -> LoraServeError:
    """The error that a status stands for."""
    return _ERRORS.get(code, WorkFailedError)(message)


def error_of(rpc_error: grpc.aio.AioRpcError) -> LoraServeError:
    """The error that a call's status stands for, with the server's message."""
    code = rpc_error.code()
    return error_for(code, rpc_error.details() or code.name)
