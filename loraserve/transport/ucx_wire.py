"""What the two ends of scheme `ucx` tell each other over the listener's connections; see `ucx.py`."""

import struct
from typing import NamedTuple

from loraserve.transport.base import BadPeerError
from loraserve.transport.wire import FIRST_SCHEME_OP

UCX_BODY = FIRST_SCHEME_OP
UCX_GO = FIRST_SCHEME_OP + 1
UCX_STOP = FIRST_SCHEME_OP + 2
UCX_STOPPED = FIRST_SCHEME_OP + 3

MIN_CHUNK_BYTES = 64 * 1024
MAX_WORKER_ADDRESS_BYTES = 16 * 1024

_ASK = struct.Struct(">QQIB")


class Ask(NamedTuple):
    """What the receiver of a body tells its sender; `host` is empty if it takes no shared memory."""

    size_bytes: int
    first_tag: int
    chunk_bytes: int
    host: bytes
    worker_address: bytes

    def encode(self) -> bytes:
        """Its bytes."""
        return (
            _ASK.pack(self.size_bytes, self.first_tag, self.chunk_bytes, len(self.host))
            + self.host
            + self.worker_address
        )

    @staticmethod
    def decode(raw: bytes) -> "Ask":
        """What `encode` wrote; BadPeerError for what cannot be."""
        if len(raw) < _ASK.size:
            raise BadPeerError("a request for a body does not say enough")
        size_bytes, first_tag, chunk_bytes, host_bytes = _ASK.unpack_from(raw)
        rest = raw[_ASK.size :]
        if chunk_bytes < MIN_CHUNK_BYTES or not 0 < len(rest) - host_bytes <= MAX_WORKER_ADDRESS_BYTES:
            raise BadPeerError("a request for a body names no UCX worker, or too small a chunk")
        return Ask(
            size_bytes=size_bytes,
            first_tag=first_tag,
            chunk_bytes=chunk_bytes,
            host=rest[:host_bytes],
            worker_address=rest[host_bytes:],
        )
