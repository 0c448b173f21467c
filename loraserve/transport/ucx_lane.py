"""A lane: one UCX context and worker of its own, driven by the one thread that has it.

A transfer has a lane for itself, on both sides, and its thread is the only one that makes it progress: no
thread spins, none is there when nothing is open, waiting happens in the kernel without the GIL, and once
that thread stops nothing of the transfer is written any more. So a transfer that fails takes nothing else
with it: its lane is thrown away, not mended.

That holds for all that UCX does while it progresses: shared memory (the receiver reads the sender's memory),
TCP, and starting copies between GPUs. RDMA writes by itself until the worker is destroyed; `discard` destroys
it, and keeps the destination's memory where it cannot.
"""

import ctypes
import logging
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from loraserve.transport.base import Buffer, PeerGoneError, TransportError
from loraserve.transport.ucx_library import UcxLibrary

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 1024**2
WINDOW_CHUNKS = 4
"""So many chunks are on their way at once: one is copied, the others are announced. Each costs about 0.1 ms
besides its copy, as both ends have to be woken."""

POSTED_CHUNKS = 8
"""So many are ready to be received: no more than that is copied before `stop` is asked again."""

SPIN_S = 0.0003
"""So long a receiver looks for its first bytes without resting: to be woken takes as long as a MiB takes."""

WAIT_MS = 10
LOOK_S = 0.01
"""How long UCX may have the thread before its other duties come round."""

DRAIN_S = 0.1
CLOSE_NS = 50_000_000
MAX_PEERS = 16

ADDRESS_FORMAT = 0x0F
"""The bits of an address's first byte that name its format (ucp/wireup/address.c)."""


class Watch(Protocol):
    """What else a thread that drives a lane looks after: the connection to the peer at the other end."""

    def fileno(self) -> int:
        """Becomes readable when there is something to look at."""
        ...

    def look(self, quiet_s: float) -> None:
        """Called often; nothing came for so long. Ends the transfer with what it raises."""
        ...


class Lane:
    """Used by one thread at a time; one that is not `clean` after a transfer can only be discarded."""

    def __init__(self, library: UcxLibrary) -> None:
        self._library = library
        self._context = library.context()
        self._worker = library.core.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self.address = bytes(self._worker.address)
        self._endpoints: dict[tuple[bytes, bool], Any] = {}
        self._peers: set[bytes] = set()
        self._serial = 0
        self._open: list[Any] = []
        self._buffers: list[Any] = []
        self._into: list[Buffer] = []
        self._from: list[Buffer] = []
        self._first_tag = 0
        self._to = (b"", False)
        self._sends = False
        # Over shared memory UCX is busy for ever with what a peer that stands still does not take; elsewhere
        # whatever it does is a sign of life, and a chunk may take long.
        self.is_shared = True
        self._watched = -1
        self._poll: select.poll | None = None

    @property
    def clean(self) -> bool:
        """Whether no transfer is open or was left in the middle."""
        return not self._buffers

    @property
    def worn(self) -> bool:
        """Whether it has met so many peers that what UCX keeps of each is to be given back."""
        return len(self._peers) > MAX_PEERS

    def next_tags(self) -> int:
        """The first tag of a transfer that this lane receives; the chunks' tags follow it."""
        self._serial += 1
        return self._serial << 32

    def receive_into(self, into: Sequence[Buffer], first_tag: int, peer: bytes) -> None:
        """Say where the chunks are to lie."""
        self._peers.add(peer)
        self._into = list(into)
        self._first_tag = first_tag
        self._post(POSTED_CHUNKS)

    def spin(self, may_go_on: Callable[[], bool]) -> None:
        """Look for the first chunk without resting, for a moment at most."""
        give_up_at = time.monotonic() + SPIN_S
        # One that has failed is seen at once: UCX is not to be driven on then (see `_close`).
        while self._open and not self._open[0].completed and may_go_on() and time.monotonic() < give_up_at:
            self._worker.progress_once()

    def take_back(self) -> None:
        """Forget receives that no sender was told of, so that the lane is clean again."""
        # ucxx cancels a request when its last reference goes; one that met no message is then forgotten.
        self._open.clear()
        self._buffers.clear()
        self._into.clear()
        self._from.clear()

    def receive(self, on_chunk: Callable[[int], None], watch: Watch) -> None:
        """Wait for all chunks; `on_chunk` is told of each by its number."""
        self.watch(watch.fileno())
        for index in range(len(self._into)):
            self._finish(index, watch)
            on_chunk(index)
            self._post(index + 1 + POSTED_CHUNKS)
        self._worker.progress_once()  # so that the sender hears of the last one
        self.take_back()

    def connect(self, to: bytes, *, error_handling: bool) -> None:
        """Prepare to send to the lane with this address; TransportError if UCX finds no way to it."""
        if to[0] & ADDRESS_FORMAT != self.address[0] & ADDRESS_FORMAT:
            # UCX ends the whole process for one that it does not know.
            raise TransportError("UCX finds no way to the peer: its address is of another format")
        self._to, self._sends = (to, error_handling), True
        self.is_shared = not error_handling
        if self._to in self._endpoints and self._endpoints[self._to].alive:
            return
        core = self._library.core
        try:
            self._endpoints[self._to] = self._worker.create_endpoint_from_worker_address(
                core.UCXAddress.create_from_buffer(to), endpoint_error_handling=error_handling
            )
        except core.UCXError as error:
            raise TransportError(f"UCX finds no way to the peer: {error}") from error
        self._peers.add(to)

    def watch(self, watched: int) -> None:
        """Have waits end too when this descriptor becomes readable."""
        self._watched = watched
        self._poll = None

    def step(self) -> bool:
        """Do what UCX has to do; or wait a moment for it, or for the watched descriptor. Whether it had."""
        # A step, not ucxx's `progress`: that one goes on as long as UCX says there is something to do, which
        # it says for ever while it cannot tell a dead peer something.
        if self._worker.progress_once():
            return True
        if self._worker.arm():
            self._rest()
        return False

    def wind_up(self, num_sent: int, watch: Watch) -> None:
        """Wait for the chunks that the sender has sent before it stopped, and be clean again."""
        self._post(num_sent)
        for index in range(min(num_sent, len(self._into))):
            self._finish(index, watch)
        self._worker.progress_once()
        self.take_back()

    def send_from(self, chunks: Sequence[Buffer], first_tag: int) -> None:
        """Begin to send chunks to the lane that is connected, a window of them at a time."""
        self._from = list(chunks)
        self._first_tag = first_tag
        self._announce(WINDOW_CHUNKS)

    def send(self, watch: Watch, may_go_on: Callable[[], bool]) -> int:
        """Send them all, as long as `may_go_on`; how many were sent."""
        self.watch(watch.fileno())
        while len(self._open) < len(self._from) and may_go_on():
            self._finish(len(self._open) - WINDOW_CHUNKS, watch)
            self._announce(len(self._open) + 1)
        num_sent = len(self._open)
        for index in range(max(0, num_sent - WINDOW_CHUNKS), num_sent):
            self._finish(index, watch)
        self.take_back()
        return num_sent

    def discard(self) -> None:
        """Give all of it back. What UCX does not let go is kept for ever, with its buffers."""
        try:
            self._close()
        except self._library.core.UCXError as error:
            self._keep(f"it does not close: {error}")

    # A request, an endpoint or a bound method of one in a local variable would live on in the traceback of
    # an error, and keep the worker from going: they are named by their index.

    def _rest(self) -> None:
        """Until UCX has something to do or the watched descriptor is readable, for a moment at most."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._worker.epoll_file_descriptor, select.POLLIN)
            self._poll.register(self._watched, select.POLLIN)
        self._poll.poll(WAIT_MS)

    def _post(self, end: int) -> None:
        tag = self._library.core.UCXXTag
        for index in range(len(self._open), min(end, len(self._into))):
            self._buffers.append(self._library.array(self._into[index]))
            self._open.append(self._worker.tag_recv(self._buffers[-1], tag(self._first_tag + index)))

    def _announce(self, end: int) -> None:
        tag = self._library.core.UCXXTag
        for index in range(len(self._open), min(end, len(self._from))):
            self._buffers.append(self._library.array(self._from[index]))
            send = self._endpoints[self._to].tag_send
            self._open.append(send(self._buffers[-1], tag(self._first_tag + index)))
            del send

    def _finish(self, index: int, watch: Watch) -> None:
        if not self._open[index].completed:
            self._await(index, watch)
        try:
            self._open[index].check_error()
        except self._library.core.UCXError as error:
            raise PeerGoneError(f"UCX lost the peer: {error}") from error

    def _await(self, index: int, watch: Watch) -> None:
        began_s = look_at_s = time.monotonic()
        while not self._open[index].completed:
            moved = self.step()
            now_s = time.monotonic()
            if moved and not self.is_shared:
                began_s = now_s
            if now_s >= look_at_s:
                watch.look(now_s - began_s)
                look_at_s = now_s + LOOK_S

    def _close(self) -> None:
        # Cancels them, before anything else: UCX 1.21 crashes over a receive that meets a message of a peer
        # which it knows to be gone.
        self._open.clear()
        self._into.clear()
        self._from.clear()
        give_up_at = time.monotonic() + DRAIN_S
        while self._worker.progress_once():
            if time.monotonic() > give_up_at:
                self._keep("it cannot tell a peer that is gone")
                return
        core = self._library.core
        while self._worker.tag_probe(core.UCXXTag(0), core.UCXXTagMask(0), remove=True).matched:
            pass  # ucxx's destructor would wait for the rest of it, which a dead sender never sends
        self._close_endpoints()
        descriptor = self._worker.epoll_file_descriptor
        identity = _identity(descriptor)
        del self._worker
        if _identity(descriptor) == identity:
            self._keep("a request of a peer that is gone does not end")
            return
        del self._context
        self._buffers.clear()

    def _close_endpoints(self) -> None:
        if not self._endpoints:
            return
        # With its own thread UCX bounds the wait for a peer that is gone; without, it waits for ever.
        self._worker.start_progress_thread(polling_mode=False, epoll_timeout=WAIT_MS)
        try:
            for endpoint in self._endpoints.values():
                endpoint.close_blocking(period=CLOSE_NS, max_attempts=1)
        finally:
            self._worker.stop_progress_thread()
        self._endpoints.clear()

    def _keep(self, reason: str) -> None:
        if self._sends:
            self._buffers.clear()  # nobody reads them where nothing progresses; a destination is kept
        logger.warning("a UCX worker and its buffers are kept until this process ends: %s", reason)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        self._library.count_kept()


def _identity(descriptor: int) -> tuple[int, int]:
    """Which open file a descriptor means; (-1, -1) for none."""
    try:
        found = os.lstat(f"/proc/self/fd/{descriptor}")
    except OSError:
        return -1, -1
    return found.st_ino, found.st_ctime_ns
