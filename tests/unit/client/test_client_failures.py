"""What the client concludes from a failed call."""

import grpc
import pytest

from loraserve.client import failures


@pytest.mark.parametrize(
    ("details", "never_sent"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: Connection refused", True),
        ("DNS resolution failed for nowhere:1: not found", True),
        ("the controller at 127.0.0.1:7 cannot be reached (failed to connect to all addresses)", False),
        ("replica r0 was lost: failed to connect to all addresses", False),
        ("Socket closed", False),
    ],
)
def test_only_grpcs_own_word_says_that_a_call_was_never_sent(details: str, never_sent: bool) -> None:
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details)
    assert failures.never_sent(error) is never_sent
    shown = str(failures.error_from(error, "router", ["127.0.0.1:1"]))
    assert ("router 127.0.0.1:1: cannot be reached" in shown) is never_sent
    assert (details in shown) is not never_sent
