"""A replica's requests by the rank of their adapters, as routers are told of them."""

from placement.routing.chooser import RankLoad


class RankCounts:
    """Requests by rank, 0 for the base model: constant time per event, whatever is in flight."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}

    def begin(self, rank: int, prompt_tokens: int) -> None:
        """A request is here and has no token yet."""
        counts = self._counts.setdefault(rank, [0, 0, 0])
        counts[1] += 1
        counts[2] += prompt_tokens

    def start(self, rank: int, prompt_tokens: int) -> None:
        """One that had none has its first token."""
        counts = self._counts[rank]
        counts[0] += 1
        counts[1] -= 1
        counts[2] -= prompt_tokens

    def end(self, rank: int, prompt_tokens: int, *, started: bool) -> None:
        """One has gone."""
        if not started:
            self.start(rank, prompt_tokens)
        counts = self._counts[rank]
        counts[0] -= 1
        if not (counts[0] or counts[1]):
            del self._counts[rank]

    def loads(self) -> tuple[RankLoad, ...]:
        """The counts now, the lowest rank first."""
        return tuple([RankLoad(rank, *self._counts[rank]) for rank in sorted(self._counts)])
