"""The transports of a process by scheme, all on one listener; a heavy one is imported only when asked for."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from loraserve.errors import BadInputError, UnavailableError
from loraserve.transport.base import Transport
from loraserve.transport.listener import Listener
from loraserve.transport.published import OnMissing
from loraserve.transport.tcp import TcpTransport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTransports:
    """What was opened, in the order asked for, and why each other scheme was left out."""

    transports: tuple[Transport, ...]
    left_out: Mapping[str, str]

    def close(self) -> None:
        """Close all of them, and with the last one the listener; safe to call twice."""
        for transport in self.transports:
            transport.close()


Opener = Callable[[Listener], Transport]
"""Opens one scheme on a listener; ImportError or UnavailableError if it cannot be had here."""


def _open_tcp(listener: Listener) -> Transport:
    return TcpTransport(listener)


def _open_ucx(listener: Listener) -> Transport:
    opener: Opener = import_module("loraserve.transport.ucx").open_ucx
    return opener(listener)


SCHEMES: Mapping[str, Opener] = {"tcp": _open_tcp, "ucx": _open_ucx}


def check_schemes(schemes: Sequence[str]) -> None:
    """BadInputError unless these are schemes that can be opened, each named once."""
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise BadInputError(f"transport {scheme!r} is not known; expected {', '.join(SCHEMES)}")
        if schemes.count(scheme) > 1:
            raise BadInputError(f"transport {scheme} is named twice")


def open_transports(
    schemes: Sequence[str],
    *,
    host: str,
    on_missing: OnMissing | None = None,
    openers: Mapping[str, Opener] | None = None,
) -> OpenTransports:
    """Listen on one socket, at a port that the system picks, and open these schemes on it.

    A scheme whose library is missing or does not work is left out, with one warning. BadInputError for an
    unknown scheme, or a host that cannot be listened on, which is what peers are told too. `openers` replaces
    `SCHEMES` in tests.
    """
    check_schemes(schemes)
    if not schemes:
        return OpenTransports(transports=(), left_out={})
    listener = Listener(host, on_missing=on_missing)
    opened: list[Transport] = []
    left_out: dict[str, str] = {}
    try:
        for scheme in schemes:
            try:
                opened.append((openers or SCHEMES)[scheme](listener))
            except (ImportError, UnavailableError) as error:
                left_out[scheme] = str(error)
                logger.warning("transport %s is left out: %s", scheme, error)
        if not opened:
            listener.close()
    except BaseException:
        for transport in opened:
            transport.close()
        listener.close()
        raise
    return OpenTransports(transports=tuple(opened), left_out=left_out)
