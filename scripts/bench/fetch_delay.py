"""A link of a given rate and delay between two network namespaces, as a process: packets go from one TUN
device to the other, in order, each held back for as long as it would take on the wire.

usage: fetch_delay.py DEVICE_A NAMESPACE_A DEVICE_B NAMESPACE_B BYTES_PER_S DELAY_S QUEUE_BYTES

Prints a line when both devices are there, and ends when its standard input does; the devices go with it. For
what a Python process can forward: 1 Gbit/s, in the large segments that the kernel hands over.
"""

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CSUM_AND_TSO4 = 0x01 | 0x02
_VNET_HEADER_BYTES = 10
_FRAME_HEADER_BYTES = 14
_MTU_BYTES = 1500
_LARGEST_BYTES = 65_536 + _VNET_HEADER_BYTES


def open_tun(device: str, namespace: str) -> int:
    """A TUN device in the namespace, and the descriptor through which its packets come and go."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _CSUM_AND_TSO4)
    subprocess.run(["ip", "link", "set", device, "netns", namespace], check=True, timeout=10)
    return fd


class Direction:
    """What is on its way from one device to the other."""

    def __init__(self, into: int, bytes_per_s: float, delay_s: float, queue_bytes: int) -> None:
        self._into = into
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._queue_s = queue_bytes / bytes_per_s
        self._sent_s = 0.0
        self._packets: deque[tuple[float, bytes]] = deque()

    def take(self, packet: bytes, now_s: float) -> None:
        """A packet that the kernel sends; dropped where the queue is full."""
        begin_s = max(now_s, self._sent_s)
        if begin_s - now_s > self._queue_s:
            return
        size_bytes = len(packet) - _VNET_HEADER_BYTES
        frames = -(-size_bytes // _MTU_BYTES)
        # The segments of a large packet have headers of their own, 52 bytes of IP and TCP.
        wire_bytes = size_bytes + (frames - 1) * 52 + frames * _FRAME_HEADER_BYTES
        self._sent_s = begin_s + wire_bytes / self._bytes_per_s
        self._packets.append((self._sent_s + self._delay_s, packet))

    def give(self, now_s: float) -> float:
        """Hand over what has arrived by now; when the next packet arrives."""
        while self._packets and self._packets[0][0] <= now_s:
            _, packet = self._packets.popleft()
            with contextlib.suppress(OSError):  # lost, as on a link: full, or its other end is down
                os.write(self._into, packet)
        return self._packets[0][0] if self._packets else float("inf")


def forward(ends: tuple[int, int], bytes_per_s: float, delay_s: float, queue_bytes: int) -> None:
    """Forward both ways until standard input ends, or a device has gone with its namespace."""
    ways = {
        source: Direction(into, bytes_per_s, delay_s, queue_bytes)
        for source, into in (ends, tuple(reversed(ends)))
    }
    poll = select.epoll()
    for fd in (*ways, 0):
        poll.register(fd, select.EPOLLIN)
    next_s = float("inf")
    while True:
        wait_s = max(0.0, next_s - time.monotonic())
        # epoll counts in milliseconds: below that, look again at once.
        for fd, _ in poll.poll(0 if wait_s < 0.001 else min(wait_s, 1.0)):
            if fd == 0 or not _drain(fd, ways[fd]):
                return
        now_s = time.monotonic()
        next_s = min(way.give(now_s) for way in ways.values())


def _drain(fd: int, way: Direction) -> bool:
    """Take what the kernel sends; whether there may be more later."""
    try:
        while True:
            way.take(os.read(fd, _LARGEST_BYTES), time.monotonic())
    except BlockingIOError:
        return True
    except OSError:
        return False


def main(arguments: list[str]) -> None:
    """Make the link."""
    device_a, namespace_a, device_b, namespace_b = arguments[:4]
    bytes_per_s, delay_s, queue_bytes = (float(one) for one in arguments[4:7])
    ends = (open_tun(device_a, namespace_a), open_tun(device_b, namespace_b))
    print("ready", flush=True)
    forward(ends, bytes_per_s, delay_s, int(queue_bytes))


if __name__ == "__main__":
    main(sys.argv[1:])
