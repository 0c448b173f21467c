"""Finding a Ray cluster and its token before Ray itself is asked."""

import socket
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.cluster.addresses import split_address
from loraserve.cluster.jobs import Jobs
from loraserve.cluster.ray_session import (
    PROBE_METHOD,
    check_reachable,
    find_address,
    is_listening,
    read_token,
    token_environment,
)
from loraserve.errors import BadInputError, UnavailableError

TOKEN = "a" * 64


class Gcs(grpc.GenericRpcHandler):
    """Answers the probe as Ray does: only to those who have the token."""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def service(self, handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization")

        def answer(request: bytes, context: Any) -> bytes:
            if self.token is not None and given != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return (
            grpc.unary_unary_rpc_method_handler(answer)
            if handler_call_details.method == PROBE_METHOD
            else None
        )


@contextmanager
def gcs(token: str | None) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[Gcs(token)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture(autouse=True)
def no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_an_open_cluster_needs_no_token() -> None:
    with gcs(None) as address:
        check_reachable(address, {})
        check_reachable(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN})


def test_the_right_token_is_taken_from_wherever_ray_would(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    home = tmp_path / "home" / ".ray"
    home.mkdir(parents=True)
    with gcs(TOKEN) as address:
        check_reachable(address, {"RAY_AUTH_TOKEN": TOKEN})
        check_reachable(address, {"RAY_AUTH_TOKEN_PATH": str(file)})
        check_reachable(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
        (home / "auth_token").write_text(TOKEN)
        check_reachable(address, {})
        assert token_environment({}) == {"RAY_AUTH_MODE": "token"}
        assert token_environment({"RAY_AUTH_MODE": "disabled"}) == {}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "no token was found"),
        ({"RAY_AUTH_MODE": "token"}, "no token was found"),
        ({"RAY_AUTH_TOKEN": "b" * 64}, "refuses the token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN}, "RAY_AUTH_MODE is disabled"),
    ],
)
def test_a_missing_or_wrong_token_is_said_with_what_to_do(environment: dict[str, str], said: str) -> None:
    with gcs(TOKEN) as address, pytest.raises(BadInputError, match=rf"{said}.*RAY_AUTH_TOKEN_PATH"):
        check_reachable(address, environment)


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert not is_listening(address)
        with pytest.raises(UnavailableError, match=f"no Ray cluster answers at {address}"):
            check_reachable(address, {})


@pytest.mark.parametrize(
    "address",
    [
        "",
        "6379",
        "host",
        "ray://127.0.0.1:10001",
        ":1",
        "host:port",
        "host:²",
        "host:0",
        "host:99999",
        "[]:1",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BadInputError, match=r"neither auto nor HOST:PORT"):
        find_address(address)


def test_auto_is_the_cluster_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.9:1")
    assert find_address("auto") == "127.0.0.9:1"
    assert find_address("127.0.0.8:2") == "127.0.0.8:2"


def test_an_unreadable_token_is_none(tmp_path: Path) -> None:
    binary = tmp_path / "token"
    binary.write_bytes(b"\xff\xfe")
    assert read_token({"RAY_AUTH_TOKEN_PATH": str(binary)}) is None
    assert read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path)}) is None
    assert read_token({"RAY_AUTH_TOKEN": "  t\n"}) == "t"


def test_a_host_that_cannot_be_is_not_there() -> None:
    for address in ("127.0.0..1:6379", f"{'a' * 64}.b:6379", "a\0b:6379"):
        assert not is_listening(find_address(address))


@given(st.text(), st.integers(0, 99_999))
def test_what_is_split_is_a_host_and_a_port(text: str, port: int) -> None:
    split = split_address(f"{text}:{port}")
    assert split is None or (split[0] in text and split[1] == port)
    assert split_address(f"10.0.0.1:{port}") == (("10.0.0.1", port) if 0 < port < 65536 else None)
    assert split_address(f"[::1]:{port}") == (("::1", port) if 0 < port < 65536 else None)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "foo",
        "auto",
        "htp://x:1",
        "ray://x:1",
        "127.0.0.1:8265",
        "http://",
        "http://x:²",
        "http://x:99999",
    ],
)
def test_what_is_no_address_of_a_job_server_is_refused_before_ray_is_asked(address: str) -> None:
    with pytest.raises(BadInputError, match=r"is not the address of a Ray job server, such as http://"):
        Jobs(address)


@pytest.mark.parametrize("address", ["http://{}", "https://{}/jobs"])
def test_an_address_of_a_job_server_is_asked(address: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UnavailableError, match="no Ray job server answers"):
            Jobs(address.format(f"127.0.0.1:{closed.getsockname()[1]}"))
