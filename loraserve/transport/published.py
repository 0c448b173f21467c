"""The regions that a process serves, by scheme and key, and those that its owner makes when asked.

Thread-safe. A region that is found stays alive as long as its finder keeps it, also once it is withdrawn.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraserve.errors import AlreadyExistsError, BadInputError
from loraserve.transport.base import (
    MAX_HEAD_BYTES,
    MAX_KEY_BYTES,
    NotPublishedError,
    PeerGoneError,
    Region,
    TransportError,
)

OnMissing = Callable[[str], Region | None]
"""Makes the region of a key that nobody published, or None. Called in a thread of its own, once per key at
a time; how long a region is kept for the next one who asks is its business."""


class _Making:
    """A call of the hook that several may wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.region: Region | None = None
        self.error: BaseException | None = None


class Published:
    """What is served now."""

    def __init__(self, on_missing: OnMissing | None = None, *, wait_s: float = 1.0) -> None:
        self._wait_s = wait_s
        self._on_missing = on_missing
        self._lock = threading.Lock()
        self._regions: dict[tuple[str, str], Region] = {}
        self._making: dict[str, _Making] = {}

    def publish(self, scheme: str, key: str, region: Region) -> None:
        """Serve a region from now on; BadInputError, AlreadyExistsError."""
        check_region(key, region)
        with self._lock:
            if (scheme, key) in self._regions:
                raise AlreadyExistsError(f"{key} is published over {scheme} already; withdraw it first")
            self._regions[scheme, key] = region

    def withdraw(self, scheme: str, key: str) -> None:
        """Serve it no more; what is not served is no error."""
        with self._lock:
            self._regions.pop((scheme, key), None)

    def withdraw_all(self, scheme: str) -> None:
        """Serve nothing over this scheme."""
        with self._lock:
            for found in [each for each in self._regions if each[0] == scheme]:
                del self._regions[found]

    def find(self, scheme: str, key: str, while_waiting: Callable[[], None]) -> Region:
        """The region; NotPublishedError. `while_waiting` is called every `wait_s` while one is made, and
        ends the wait with what it raises."""
        with self._lock:
            region = self._regions.get((scheme, key))
            if region is not None:
                return region
            if self._on_missing is None:
                raise NotPublishedError(f"{key} is not published over {scheme}")
            making = self._making.get(key)
            begun = making is None
            if making is None:
                making = self._making[key] = _Making()
        if begun:
            self._start(key, making)
        while not making.done.wait(self._wait_s):
            while_waiting()
        if isinstance(making.error, TransportError):
            raise making.error
        if making.error is not None:
            # What is wrong with one region is no fault of who serves it, nor of the way to there.
            raise NotPublishedError(f"{key} could not be made: {making.error}")
        if making.region is None:
            raise NotPublishedError(f"{key} is not published over {scheme}")
        return making.region

    def _start(self, key: str, making: _Making) -> None:
        try:
            threading.Thread(target=self._make, args=(key, making), name="fabric-make", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._end(key, making, error=PeerGoneError(f"{key} could not be made: {error}"))

    def _make(self, key: str, making: _Making) -> None:
        assert self._on_missing is not None
        try:
            region = self._on_missing(key)
            if region is not None:
                check_region(key, region)
            self._end(key, making, region=region)
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            self._end(key, making, error=error)

    def _end(
        self, key: str, making: _Making, *, region: Region | None = None, error: BaseException | None = None
    ) -> None:
        making.region, making.error = region, error
        with self._lock:
            del self._making[key]
        making.done.set()


def check_region(key: str, region: Region) -> None:
    """BadInputError unless peers can be told of this region under this key."""
    if not 0 < len(key.encode()) <= MAX_KEY_BYTES:
        raise BadInputError(f"a region's key has 1 to {MAX_KEY_BYTES} bytes, not {len(key.encode())}")
    if len(region.head) > MAX_HEAD_BYTES:
        raise BadInputError(
            f"{key}: its head has {len(region.head)} bytes, at most {MAX_HEAD_BYTES} are allowed"
        )
    if not hasattr(region.body, "__cuda_array_interface__"):
        with memoryview(region.body) as body:
            if body.nbytes != region.size_bytes or not body.c_contiguous:
                raise BadInputError(f"{key}: its body is not {region.size_bytes} contiguous bytes")


class InUse:
    """Counts the bytes of regions that are being read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, count: int) -> None:
        """So many more; negative for fewer."""
        with self._lock:
            self._bytes += count

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """So many more for the length of a `with`."""
        self.add(count)
        try:
            yield
        finally:
            self.add(-count)

    @property
    def bytes(self) -> int:
        """How many there are now."""
        return self._bytes
