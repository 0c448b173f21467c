"""Which congestion control a connection has: the system's, except between two processes of one host.

There nothing is lost and nothing is to be paced, and one that paces (bbr) costs up to three quarters of the
speed. A socket that had such a one keeps its pacing for life, so a listening socket must have the plain one
(reno, which any user may choose) before anybody connects, and what comes from elsewhere gets the system's.
"""

import ipaddress
import socket
from contextlib import suppress

_PLAIN = b"reno"
_NAME_BYTES = 16


def make_plain(listening: socket.socket) -> bytes:
    """Let connections begin with the plain control; returns the system's own, for `restore`."""
    usual = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES).rstrip(b"\0")
    with suppress(OSError):  # not in this kernel: as it was, only slower
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _PLAIN)
    return usual


def restore(accepted: socket.socket, usual: bytes) -> None:
    """Give a connection from another host the system's control; OSError if it has gone already."""
    here, there = accepted.getsockname()[0], accepted.getpeername()[0]
    if here == there or ipaddress.ip_address(there.split("%")[0]).is_loopback:
        return
    with suppress(OSError):  # the plain one works as well
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, usual)
