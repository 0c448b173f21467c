"""Fixtures of the transports' tests."""

from collections.abc import Iterator

import pytest

from loraserve.transport.listener import Listener
from loraserve.transport.tcp import TcpTransport
from tests.support.transport_kit import nothing_leaks


@pytest.fixture
def leak_free() -> Iterator[None]:
    """No thread and no descriptor is left over."""
    with nothing_leaks():
        yield


@pytest.fixture
def ends(leak_free: None) -> Iterator[tuple[TcpTransport, TcpTransport]]:
    """Two processes' transports, in one process; nothing is in use at the end."""
    both = TcpTransport(Listener("127.0.0.1")), TcpTransport(Listener("127.0.0.1"))
    yield both
    for one in both:
        one.close()
        one.close()
    assert [one.active_bytes() for one in both] == [0, 0]
