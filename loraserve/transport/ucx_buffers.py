"""Buffers of host and of device memory, cut into the pieces that are sent as one message each."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from loraserve.errors import BadInputError
from loraserve.transport.base import Buffer


class DeviceBytes:
    """A part of a buffer of device memory, as bytes; keeps the buffer."""

    def __init__(self, owner: Buffer, address: int, size_bytes: int, readonly: bool) -> None:
        self._owner = owner
        self._address = address
        self._readonly = readonly
        self.nbytes = size_bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self._address, self._readonly),
            "strides": None,
            "version": 3,
        }

    def part(self, begin: int, end: int) -> "DeviceBytes":
        """Bytes [begin, end) of it."""
        return DeviceBytes(self._owner, self._address + begin, end - begin, self._readonly)


def is_device(buffer: Buffer) -> bool:
    """Whether this is device memory."""
    return hasattr(buffer, "__cuda_array_interface__")


@contextmanager
def as_bytes(buffer: Buffer, *, to_write: bool) -> Iterator[memoryview | DeviceBytes]:
    """The buffer as bytes for the length of a `with`; BadInputError unless it is contiguous, ValueError if
    it is to be written and cannot be."""
    if is_device(buffer):
        yield _device_bytes(buffer)
        return
    with memoryview(buffer) as given, given.cast("B") as body:
        if to_write and body.readonly:
            raise ValueError("the destination of a fetch cannot be written")
        yield body


def cut(body: memoryview | DeviceBytes, piece_bytes: int) -> list[Buffer]:
    """Pieces of `piece_bytes`, the last one with what is left."""
    part = body.part if isinstance(body, DeviceBytes) else lambda begin, end: body[begin:end]
    return [
        part(begin, min(begin + piece_bytes, body.nbytes)) for begin in range(0, body.nbytes, piece_bytes)
    ]


def _device_bytes(buffer: Buffer) -> DeviceBytes:
    interface = buffer.__cuda_array_interface__
    item_bytes = int(interface["typestr"][2:])
    strides = interface.get("strides")
    shape = interface["shape"]
    if strides is not None:
        expected = [item_bytes * prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if list(strides) != expected:
            raise BadInputError("a buffer of device memory must be contiguous")
    address, readonly = interface["data"]
    return DeviceBytes(buffer, address, item_bytes * prod(shape), readonly)
