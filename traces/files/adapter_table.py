"""The adapters that a trace names, each with a number.

A name with two ranks is two adapters: a trace may say so, and what it says is kept.
"""

from traces.columns import TraceAdapter

MAX_ADAPTERS = 1_000_000
MAX_NAME_BYTES = 64 << 20
"""Together; far beyond any real trace, and what keeps a doctored one from filling the memory."""


class AdapterTable:
    """Numbers from 0 in order of first sight."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, int | None], int] = {}
        self._name_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def place(self, name: str, rank: int | None) -> int:
        """The number of this adapter; OverflowError for one too many."""
        key = (name, rank)
        place = self._places.get(key)
        if place is None:
            self._name_bytes += len(name) * 4
            if len(self._places) >= MAX_ADAPTERS or self._name_bytes > MAX_NAME_BYTES:
                raise OverflowError(f"more than {len(self._places):,} different adapters")
            place = self._places[key] = len(self._places)
        return place

    def adapters(self) -> tuple[TraceAdapter, ...]:
        """All of them in order."""
        return tuple(TraceAdapter(name=name, rank=rank) for name, rank in self._places)
