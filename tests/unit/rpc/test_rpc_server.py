"""Where a server may listen, and gRPC's settings before it is imported."""

import os
import subprocess
import sys

import pytest

from loraserve.errors import BadInputError
from loraserve.rpc.server import bind, check_loopback, make_server
from loraserve.rpc.tuning import GRPC_ENVIRONMENT, tune_grpc


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_flag(host: str) -> None:
    check_loopback(host, insecure_listen=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_any_other_host_needs_the_flag(host: str) -> None:
    with pytest.raises(BadInputError, match=r"^host: .*--insecure-listen"):
        check_loopback(host, insecure_listen=False)
    check_loopback(host, insecure_listen=True)


async def test_two_servers_cannot_share_a_port() -> None:
    first, second = make_server(), make_server()
    port = bind(first, "127.0.0.1", 0)
    try:
        with pytest.raises(BadInputError, match=f"127.0.0.1:{port}"):
            bind(second, "127.0.0.1", port)
    finally:
        await first.stop(None)
        await second.stop(None)


def test_settings_already_there_are_left_alone() -> None:
    chosen = {"GRPC_EXPERIMENTS": "mine"}
    tune_grpc(chosen)
    assert chosen == {"GRPC_EXPERIMENTS": "mine"}


def test_after_grpc_is_imported_the_settings_come_too_late() -> None:
    import grpc  # noqa: F401

    before = dict(os.environ)
    assert tune_grpc() is False
    assert dict(os.environ) == before


def test_the_settings_are_ones_that_this_grpc_knows() -> None:
    script = "from loraserve.rpc.tuning import tune_grpc; print(tune_grpc()); import grpc.aio"
    environment = {key: value for key, value in os.environ.items() if key not in GRPC_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", script + "; grpc.insecure_channel('127.0.0.1:1').close()"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert "Unknown experiment" not in done.stderr
    assert done.stdout.strip() in ("True", "False")
