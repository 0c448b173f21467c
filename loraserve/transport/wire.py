"""What the fabric's sockets carry: a hello, then frames.

A client begins with a hello of 26 bytes:

    magic 8 | version 2 | token 16

The token comes with the address and names one life of one process: a process that was started again at the
same port has another one. The server answers with magic and version (10 bytes); a refusal follows as a frame.

A frame is a header of 28 bytes, its key (UTF-8), and its payload:

    op 1 | zero 1 | key's length 2 | request 4 | begin 8 | end 8 | payload's length 4 | key | payload

Numbers are big endian. An answer repeats the request's number. What begin, end and payload say depends on op:

    HEAD     the region under key?          payload: the scheme that asks
    BODY     bytes [begin, end) of it           payload: the body's length, 8 bytes
    HEAD_IS  payload: the head              end: the body's length
    DATA     bytes [begin, end) follow      payload: the body's length, 8 bytes
    WAIT     the answer is being made, ask on
    ERROR    begin: an `ErrorCode`          payload: one line for a person

Ops from `FIRST_SCHEME_OP` on belong to schemes. Lengths are checked before anything is allocated.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from loraserve.transport.base import (
    MAX_HEAD_BYTES,
    MAX_KEY_BYTES,
    BadPeerError,
    NotPublishedError,
    PeerBusyError,
    PeerFailedError,
    PeerGoneError,
    TransportError,
)

MAGIC = b"LoRAFab\x01"
VERSION = 1
TOKEN_BYTES = 16

MAX_REQUEST_PAYLOAD_BYTES = 64 * 1024
MAX_ANSWER_PAYLOAD_BYTES = MAX_HEAD_BYTES
MAX_MESSAGE_CHARS = 500

_HELLO = struct.Struct(f">8sH{TOKEN_BYTES}s")
_WELCOME = struct.Struct(">8sH")
_HEADER = struct.Struct(">BBHIQQI")
_LENGTH = struct.Struct(">Q")

HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size
HEADER_BYTES = _HEADER.size
WELCOME = _WELCOME.pack(MAGIC, VERSION)


class Op(IntEnum):
    """The ops that every scheme shares, and those of `tcp`."""

    HEAD = 1
    BODY = 2
    HEAD_IS = 3
    DATA = 4
    WAIT = 5
    ERROR = 6


FIRST_SCHEME_OP = 16


class ErrorCode(IntEnum):
    """Why a request got no answer."""

    NOT_PUBLISHED = 1
    BUSY = 2
    BAD_REQUEST = 3
    OTHER_INSTANCE = 4
    FAILED = 5


_ERRORS: dict[int, type[TransportError]] = {
    ErrorCode.NOT_PUBLISHED: NotPublishedError,
    ErrorCode.BUSY: PeerBusyError,
    ErrorCode.BAD_REQUEST: BadPeerError,
    ErrorCode.OTHER_INSTANCE: PeerGoneError,
    ErrorCode.FAILED: PeerFailedError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message of either side; bytes that follow a DATA frame are not part of it."""

    op: int
    request_id: int = 0
    key: str = ""
    begin: int = 0
    end: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        """The frame's bytes."""
        key = self.key.encode()
        header = _HEADER.pack(self.op, 0, len(key), self.request_id, self.begin, self.end, len(self.payload))
        return header + key + self.payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A frame's first bytes, checked: so much may be read for the rest."""

    op: int
    request_id: int
    begin: int
    end: int
    key_bytes: int
    payload_bytes: int

    @property
    def rest_bytes(self) -> int:
        """What follows the header."""
        return self.key_bytes + self.payload_bytes

    def frame(self, rest: bytes) -> Frame:
        """The whole frame; BadPeerError for a key that is no text."""
        try:
            key = rest[: self.key_bytes].decode()
        except UnicodeDecodeError:
            raise BadPeerError("a frame's key is not UTF-8") from None
        return Frame(
            op=self.op,
            request_id=self.request_id,
            key=key,
            begin=self.begin,
            end=self.end,
            payload=rest[self.key_bytes :],
        )


def decode_header(raw: bytes, max_payload_bytes: int) -> Header:
    """The header in exactly `HEADER_BYTES` bytes; BadPeerError if nobody of ours can have sent it."""
    op, zero, key_bytes, request_id, begin, end, payload_bytes = _HEADER.unpack(raw)
    if op == 0 or zero != 0:
        raise BadPeerError("a frame begins with bytes that mean nothing")
    if key_bytes > MAX_KEY_BYTES:
        raise BadPeerError(f"a frame's key has {key_bytes} bytes, at most {MAX_KEY_BYTES} are allowed")
    if payload_bytes > max_payload_bytes:
        raise BadPeerError(
            f"a frame's payload has {payload_bytes} bytes, at most {max_payload_bytes} are allowed"
        )
    return Header(
        op=op,
        request_id=request_id,
        begin=begin,
        end=end,
        key_bytes=key_bytes,
        payload_bytes=payload_bytes,
    )


def encode_hello(token: bytes) -> bytes:
    """What a client sends first."""
    return _HELLO.pack(MAGIC, VERSION, token)


def decode_hello(raw: bytes) -> bytes:
    """The token that a client names; BadPeerError if this is no hello of our version."""
    if len(raw) != HELLO_BYTES:
        raise BadPeerError("it does not speak the fabric's protocol")
    magic, version, token = _HELLO.unpack(raw)
    _check_version(magic, version)
    return bytes(token)


def check_welcome(raw: bytes) -> None:
    """BadPeerError unless a server of our version answers."""
    _check_version(*_WELCOME.unpack(raw))


def _check_version(magic: bytes, version: int) -> None:
    if magic != MAGIC:
        raise BadPeerError("it does not speak the fabric's protocol")
    if version != VERSION:
        raise BadPeerError(f"the other side speaks version {version} of the fabric's protocol, not {VERSION}")


def error_frame(request_id: int, code: ErrorCode, message: str) -> Frame:
    """The answer that says why there is no answer."""
    return Frame(op=Op.ERROR, request_id=request_id, begin=code, payload=_one_line(message).encode())


def error_of(frame: Frame) -> TransportError:
    """The error that an ERROR frame stands for."""
    line = _one_line(frame.payload[: 4 * MAX_MESSAGE_CHARS].decode(errors="replace"))
    return _ERRORS.get(frame.begin, BadPeerError)(line or f"the peer refused, with code {frame.begin}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())[:MAX_MESSAGE_CHARS]
    return "".join(each if each.isprintable() else "?" for each in line)


def range_frame(op: Op, request_id: int, begin: int, end: int, *, of_bytes: int, key: str = "") -> Frame:
    """A BODY or DATA frame: bytes [begin, end) of a body of `of_bytes`."""
    return Frame(op=op, request_id=request_id, key=key, begin=begin, end=end, payload=_LENGTH.pack(of_bytes))


def range_of(frame: Frame) -> tuple[int, int, int]:
    """Begin, end, and the whole body's length; BadPeerError if they do not fit each other."""
    if len(frame.payload) != _LENGTH.size:
        raise BadPeerError("a frame does not say how long the body is")
    (of_bytes,) = _LENGTH.unpack(frame.payload)
    if not frame.begin <= frame.end <= of_bytes:
        raise BadPeerError(f"a frame names bytes {frame.begin} to {frame.end} of {of_bytes}")
    return frame.begin, frame.end, of_bytes
