"""How often Ray is asked for room that it gives where it is of no use."""

import pytest

from loraserve.cluster import groups
from loraserve.cluster.groups import Place, ReplicaGroups
from loraserve.cluster.nodes import LOOPBACK, Node
from loraserve.errors import ReplicaStartError
from placement.types import ReplicaId

REPLICA = ReplicaId("replica-0")


class UselessRoom(ReplicaGroups):
    """Ray has room at once, on a node that no router reaches."""

    def __init__(self) -> None:
        super().__init__("c", {"CPU": 1.0}, home=LOOPBACK)
        self.asked = 0
        self.released = 0

    async def release(self, replica: ReplicaId) -> None:
        self.released += 1

    async def _take(self, replica: ReplicaId) -> Place | None:
        return None

    async def _ask(self, replica: ReplicaId, node: Node | None) -> Place | None:
        self.asked += 1
        return None

    async def _answering(self) -> list[Node]:
        return []


async def test_room_that_cannot_be_used_is_asked_for_at_the_pace_of_room_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "ATTEMPT_S", 0.05)
    room = UselessRoom()
    with pytest.raises(ReplicaStartError, match="waited 0 s for room for 0 of 1 replica"):
        await room.reserve(REPLICA, 0.2)
    assert room.asked <= 6
    assert room.released == 1
