"""Errors and statuses stand for each other; nothing of the inside leaks."""

import logging
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from loraserve import errors
from loraserve.rpc.server import make_channel, make_server
from loraserve.rpc.status import abort_with, error_of, status_of

Code = grpc.StatusCode
PAIRS = [
    (errors.BadInputError, Code.INVALID_ARGUMENT),
    (errors.NotFoundError, Code.NOT_FOUND),
    (errors.AlreadyExistsError, Code.ALREADY_EXISTS),
    (errors.OverloadedError, Code.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, Code.UNAVAILABLE),
    (errors.DeadlineError, Code.DEADLINE_EXCEEDED),
    (errors.StaleError, Code.FAILED_PRECONDITION),
    (errors.WorkFailedError, Code.INTERNAL),
]


@pytest.mark.parametrize(("kind", "code"), PAIRS)
def test_an_error_and_its_status_stand_for_each_other(kind: type[errors.LoraServeError], code: Code) -> None:
    assert status_of(kind("why")) == (code, "why")
    back = error_of(AioRpcError(code, Metadata(), Metadata(), details="why"))
    assert (type(back), str(back)) == (kind, "why")


def test_errors_below_these_have_their_parents_status() -> None:
    assert status_of(errors.AdapterRejectedError("x"))[0] is Code.INVALID_ARGUMENT
    assert status_of(errors.EngineDeadError("x"))[0] is Code.UNAVAILABLE
    assert status_of(errors.ReplicaStartError("r", "x"))[0] is Code.INTERNAL
    assert status_of(TimeoutError())[0] is Code.DEADLINE_EXCEEDED


def test_a_status_without_a_message_still_says_something() -> None:
    assert str(error_of(AioRpcError(Code.CANCELLED, Metadata(), Metadata()))) == "CANCELLED"


async def test_an_unforeseen_error_leaves_its_traceback_in_the_log_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            raise KeyError("secret path")
        except KeyError as error:
            await abort_with(context, error, (("who", "me"),))

    server = make_server()
    handlers: dict[str, Any] = {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = make_channel(f"127.0.0.1:{port}")
    call: Any = channel.unary_unary("/t/Fail")
    try:
        with caplog.at_level(logging.ERROR), pytest.raises(AioRpcError) as caught:
            await call(b"")
    finally:
        await channel.close()
        await server.stop(None)
    assert caught.value.code() is Code.INTERNAL
    assert "secret" not in (caught.value.details() or "")
    assert "KeyError" in (caught.value.details() or "")
    assert dict(caught.value.trailing_metadata())["who"] == "me"
    assert "secret path" in caplog.text
