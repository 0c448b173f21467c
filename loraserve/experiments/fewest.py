"""Finds the fewest replicas that hold; pure, and the same for whatever is probed."""


class ReplicaSearch:
    """One search over 1 to `most` replicas: ask `next_replicas`, try it, `tell` whether it held, until there
    is none.

    It takes for granted that what holds on so many replicas holds on more, and steps from `start` by one,
    two, four and so on until the answer is bracketed, then halves. If a probe says otherwise, the failure
    counts.
    """

    def __init__(self, *, most: int, start: int = 1) -> None:
        if most < 1:
            raise ValueError(f"most {most}; expected at least 1")
        self._most = most
        self._next: int | None = min(max(1, start), most)
        self._held: int | None = None
        self._failed = 0
        self._step = 1

    @property
    def fewest(self) -> int | None:
        """The fewest that held, None if none did."""
        return self._held

    @property
    def next_replicas(self) -> int | None:
        """How many to try now, None when the search is over."""
        return self._next

    def tell(self, *, held: bool) -> None:
        """How that went; ValueError when nothing was asked for."""
        if self._next is None:
            raise ValueError("the search is over")
        if held:
            self._held = self._next
        else:
            self._failed = self._next
        self._next = self._choose()

    def _choose(self) -> int | None:
        if self._held is None:
            if self._failed >= self._most:
                return None
            chosen = min(self._failed + self._step, self._most)
        elif self._failed >= self._held - 1:
            return None
        elif self._failed == 0:
            chosen = max(1, self._held - self._step)
        else:
            return (self._held + self._failed) // 2
        self._step *= 2
        return chosen
