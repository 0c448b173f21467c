"""Rooms as arrays, so that a policy can ask a thousand replicas at once which of them has room."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from placement.policies.base import Room
from placement.types import AdapterVersion

Mask = npt.NDArray[np.bool_]


class RoomArrays:
    """Rooms in the order given."""

    def __init__(self, rooms: Iterable[Room]) -> None:
        self.rooms = list(rooms)
        self.max_ranks = np.array([room.spec.max_lora_rank for room in self.rooms], dtype=np.int64)
        self.free_adapters = np.array([room.free_adapters for room in self.rooms], dtype=np.int64)
        self.free_bytes = np.array([room.free_bytes for room in self.rooms], dtype=np.int64)

    def fitting(self, adapter: AdapterVersion) -> Mask:
        """Where there is room for it, whether it is there already or not."""
        fitting: Mask = (
            (self.max_ranks >= adapter.rank)
            & (self.free_adapters > 0)
            & (self.free_bytes >= adapter.size_bytes)
        )
        return fitting

    def put(self, index: int, adapter: AdapterVersion) -> None:
        """One copy in this room, which it must fit."""
        self.rooms[index].put(adapter)
        self.look_again(index)

    def look_again(self, index: int) -> None:
        """This room was filled or emptied by another."""
        self.free_adapters[index] = self.rooms[index].free_adapters
        self.free_bytes[index] = self.rooms[index].free_bytes
