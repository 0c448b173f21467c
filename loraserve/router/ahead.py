"""Work for the next routing decisions, done between requests and not within one."""

import asyncio
from collections.abc import Callable

from placement.types import ReplicaId


class Ahead:
    """Has the changes at replicas taken into account when the event loop comes to it next, those at one
    replica until then together; bounded by the replicas there are. Works inside a running loop alone."""

    def __init__(self, prepare: Callable[[ReplicaId], None]) -> None:
        self._prepare = prepare
        self._changed: set[ReplicaId] = set()

    def note(self, replica_id: ReplicaId) -> None:
        """Something changes at this replica, by the end of the loop's turn."""
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._run)
        self._changed.add(replica_id)

    def _run(self) -> None:
        changed, self._changed = self._changed, set()
        for replica_id in changed:
            self._prepare(replica_id)
