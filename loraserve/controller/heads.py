"""The digests that fetched adapters are checked against, from the controller's store."""

import asyncio
import hashlib

from loraserve.adapters import AdapterStore
from placement.types import AdapterVersion, VersionId

MAX_KEPT = 100_000


class SegmentHeads:
    """The sha256 of each version's segment head, worked out once: it is a function of the version."""

    def __init__(self, library: AdapterStore) -> None:
        self._library = library
        self._kept: dict[VersionId, str] = {}
        self._preparing = asyncio.Lock()

    async def prepare(self, adapter: AdapterVersion) -> None:
        """Let `sha256_of` be quick: an entry of an older store has its weights read for it, in a thread."""
        async with self._preparing:
            if adapter.version_id not in self._kept:
                await asyncio.to_thread(self.sha256_of, adapter)

    def sha256_of(self, adapter: AdapterVersion) -> str:
        """NotFoundError for content that the store does not hold."""
        version = adapter.version_id
        found = self._kept.get(version)
        if found is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            found = hashlib.sha256(self._library.segment_head(adapter.sha256, version)).hexdigest()
            self._kept[version] = found
        return found
