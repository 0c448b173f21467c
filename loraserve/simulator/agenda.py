"""What is to happen in simulated time besides arrivals, in order of time and then of being asked for."""

from collections.abc import Callable
from heapq import heappop, heappush

Act = Callable[[int], None]
"""Something that happens; it is told the time, in picoseconds."""

FAR_PS = (1 << 62) - 1
"""Later than anything that is simulated, and sooner than what the replica model calls never."""


class Agenda:
    """Acts in their order; two of one time happen in the order in which they were put.

    `due_ps` is when the next act is due, `FAR_PS` without one.
    """

    __slots__ = ("_heap", "_num_put", "due_ps", "num_done")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Act]] = []
        self._num_put = 0
        self.due_ps = FAR_PS
        self.num_done = 0

    def __len__(self) -> int:
        """How many acts are yet to happen."""
        return len(self._heap)

    def put(self, at_ps: int, act: Act) -> None:
        """Have it happen then; not before what is happening now."""
        heappush(self._heap, (at_ps, self._num_put, act))
        self._num_put += 1
        self.due_ps = self._heap[0][0]

    def run_until(self, until_ps: int) -> None:
        """Let everything happen that is due by then, and what comes of it by then."""
        heap = self._heap
        while heap and heap[0][0] <= until_ps:
            at_ps, _, act = heappop(heap)
            self.due_ps = heap[0][0] if heap else FAR_PS
            self.num_done += 1
            act(at_ps)
