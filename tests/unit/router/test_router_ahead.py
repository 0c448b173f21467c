"""What a router works out between requests: once per turn of its loop, and only where something changed."""

import asyncio

from loraserve.router.ahead import Ahead
from loraserve.router.own import OwnBook
from placement.types import ReplicaId, VersionId

R0, R1 = ReplicaId("r0"), ReplicaId("r1")


def test_changes_are_prepared_once_in_the_next_turn() -> None:
    seen: list[tuple[ReplicaId, int]] = []

    async def turns() -> None:
        def prepare(replica_id: ReplicaId) -> None:
            seen.append((replica_id, sum(book.by_replica[replica_id].ranks.values())))

        book = OwnBook(Ahead(prepare).note)
        for _ in range(3):
            book.at(R0).send(VersionId("a@1"), 8, 100)
        book.at(R1).send(None, 0, 100)
        assert seen == []
        await asyncio.sleep(0)
        assert sorted(seen) == [(R0, 3), (R1, 1)]
        seen.clear()
        book.at(R0).end(VersionId("a@1"), 8)
        await asyncio.sleep(0)
        assert seen == [(R0, 2)]
        await asyncio.sleep(0)
        assert seen == [(R0, 2)]

    asyncio.run(turns())
