"""Transports are opened by name, on one socket, and what cannot be had is left out aloud."""

import subprocess
import sys

import pytest

from loraserve.errors import BadInputError, UnavailableError
from loraserve.transport import registry
from loraserve.transport.base import Transport
from loraserve.transport.listener import Listener
from loraserve.transport.registry import OpenTransports, check_schemes, open_transports
from tests.support.adapter_maker import one_line
from tests.support.transport_kit import ROOT, Fetched, fetch, memory_region, nothing_leaks


class Missing:
    """Opens no transport."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, listener: Listener) -> Transport:
        """Fail as a missing library does."""
        raise self.error


def opened(error: Exception, *schemes: str) -> OpenTransports:
    """Open these, where `ucx` fails with this error."""
    openers: dict[str, registry.Opener] = {**registry.SCHEMES, "ucx": Missing(error)}
    return open_transports(schemes, host="127.0.0.1", openers=openers)


def test_what_is_opened_serves_and_leaves_nothing_behind() -> None:
    with nothing_leaks():
        one, other = (open_transports(["tcp"], host="127.0.0.1") for _ in range(2))
        (there,), (here,) = one.transports, other.transports
        there.publish("k", memory_region(b"body"))
        assert fetch(here, there.address, "k", Fetched(4)).body == b"body"
        assert dict(one.left_out) == {}
        for each in (one, other, one, other):
            each.close()


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with nothing_leaks():
        for schemes in (["tcp", "rdma"], ["rdma"]):
            with pytest.raises(
                BadInputError, match="transport 'rdma' is not known; expected tcp, ucx"
            ) as raised:
                open_transports(schemes, host="127.0.0.1")
            assert one_line(raised.value)
        with pytest.raises(BadInputError, match="transport tcp is named twice"):
            check_schemes(["tcp", "tcp"])
        check_schemes([])


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'ucxx'"), UnavailableError("UCX finds no device")]
)
def test_a_scheme_that_cannot_be_had_is_left_out_with_one_warning(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_leaks():
        found = opened(error, "ucx", "tcp")
        assert [each.scheme for each in found.transports] == ["tcp"]
        assert dict(found.left_out) == {"ucx": str(error)}
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"transport ucx is left out: {error}" in caplog.text
        found.close()


def test_without_any_scheme_nothing_listens() -> None:
    with nothing_leaks():
        assert open_transports([], host="127.0.0.1").transports == ()
        assert opened(ImportError("no"), "ucx").transports == ()


def test_a_defect_of_one_scheme_leaves_nothing_of_the_others() -> None:
    with nothing_leaks(), pytest.raises(ZeroDivisionError):
        opened(ZeroDivisionError(), "tcp", "ucx")


def test_ucx_is_imported_only_when_it_is_asked_for() -> None:
    program = (
        "import sys; from loraserve.transport.registry import open_transports; "
        "open_transports(['tcp'], host='127.0.0.1').close(); "
        "print([name for name in ('ucxx', 'loraserve.transport.ucx', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"
