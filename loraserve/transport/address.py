"""Where a process listens, and which life of it, as the opaque bytes that travel in the control plane."""

from dataclasses import dataclass

from loraserve.transport.base import BadPeerError
from loraserve.transport.link import show_peer
from loraserve.transport.wire import TOKEN_BYTES

MAX_ADDRESS_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Host and port of a listener, and the token of the process that had them when this was written."""

    host: str
    port: int
    token: bytes

    def encode(self) -> bytes:
        """`host:port/token`, as text that a person can read."""
        return f"{show_peer(self.host, self.port)}/{self.token.hex()}".encode()

    @staticmethod
    def decode(raw: bytes) -> "Address":
        """What `encode` wrote; BadPeerError for anything else."""
        try:
            if len(raw) > MAX_ADDRESS_BYTES:
                raise ValueError
            where, _, token = raw.decode("ascii").rpartition("/")
            host, _, port = where.rpartition(":")
            found = Address(host=host.strip("[]"), port=int(port), token=bytes.fromhex(token))
        except ValueError:
            raise BadPeerError(f"{raw[:80]!r} is no address of a fabric's listener") from None
        if not found.host or not 0 < found.port < 65536 or len(found.token) != TOKEN_BYTES:
            raise BadPeerError(f"{raw[:80]!r} is no address of a fabric's listener")
        return found
