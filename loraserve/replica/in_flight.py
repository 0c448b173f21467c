"""One request at a replica: which attempt at it this is, and who runs it."""

import asyncio
from dataclasses import dataclass, field

from loraserve.errors import LoraServeError
from loraserve.request import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Which attempt at a request this is: of two with one id, the one with the higher `order` runs.

    `lease_id` is set for a client that comes directly. It is `waited_s` after its router knew of it, which
    `has_missed` if it knew of no holder at first.
    """

    order: tuple[int, int] = (0, 0)
    lease_id: str = ""
    waited_s: float = 0.0
    has_missed: bool = False


FIRST_TURN = Turn()


@dataclass(slots=True)
class InFlight:
    """One admitted request: what it may still produce, and who runs it."""

    request: GenerationRequest
    remaining_tokens: int
    order: tuple[int, int]
    task: "asyncio.Task[object] | None"
    verdict: LoraServeError | None = None
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, verdict: LoraServeError) -> None:
        """End the request wherever it stands: in the engine, or with a reader that does not read.

        Who runs it finds the verdict in the cancellation (`errors.verdict_of`).
        """
        if self.verdict is None and self.task is not None:
            self.verdict = verdict
            self.task.cancel(msg=verdict)
