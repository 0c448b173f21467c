"""The prefix cache: which blocks of prompts are in the KV cache and may be shared.

Counts blocks, holds no tokens. A block is named by a hash of everything up to it, as vLLM and Mooncake's
traces do, so equal names mean equal prefixes.
"""

from collections import OrderedDict

from loraserve.engines.replica_model.sequence import ReplicaLimits, Sequence


class PrefixCache:
    """Named blocks in use (counted by user) and unused ones, evicted in the order they came out of use."""

    def __init__(self, limits: ReplicaLimits) -> None:
        self._name_tokens = limits.hash_block_tokens
        self._name_blocks = limits.hash_block_tokens // limits.block_tokens
        self._users: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        self.hit_tokens = 0

    @property
    def unused_blocks(self) -> int:
        """KV blocks that nobody uses and that may be evicted."""
        return len(self._unused) * self._name_blocks

    @property
    def used_blocks(self) -> int:
        """KV blocks with a name that somebody uses, each counted once."""
        return len(self._users) * self._name_blocks

    def match(self, sequence: Sequence) -> tuple[int, int]:
        """How many of the sequence's first names are here, and how many KV blocks of them are in use.

        At least one token is left to compute, for somebody must draw the next one.
        """
        # A last name may stand for a part of a block, which nobody shares.
        most = min(sequence.prompt_tokens, sequence.known - 1) // self._name_tokens
        matched = used = 0
        for name in sequence.hash_ids[:most]:
            if name in self._users:
                used += 1
            elif name not in self._unused:
                break
            matched += 1
        return matched, used * self._name_blocks

    def take(self, sequence: Sequence, num_names: int) -> tuple[int, int]:
        """Let the sequence use its first names; the tokens they hold, and the KV blocks now in use by it
        that nobody used before."""
        fresh = 0
        for name in sequence.hash_ids[:num_names]:
            users = self._users.get(name, 0)
            if users == 0:
                del self._unused[name]
                fresh += 1
            self._users[name] = users + 1
            sequence.cached.append(name)
        self.hit_tokens += num_names * self._name_tokens
        return num_names * self._name_tokens, fresh * self._name_blocks

    def register(self, sequence: Sequence) -> None:
        """Name the blocks that the sequence has computed; one whose name is here already stays its own."""
        done = min(sequence.computed, sequence.prompt_tokens) // self._name_tokens
        for name in sequence.hash_ids[len(sequence.cached) : done]:
            if name in self._users or name in self._unused:
                return
            self._users[name] = 1
            sequence.cached.append(name)

    def release(self, sequence: Sequence) -> tuple[int, int]:
        """Take the sequence's uses back; the KV blocks it shared, and those of them that nobody uses now.

        The end of a prefix becomes evictable before its beginning.
        """
        shared, idle = len(sequence.cached), 0
        for name in reversed(sequence.cached):
            self._users[name] -= 1
            if self._users[name] == 0:
                del self._users[name]
                self._unused[name] = None
                idle += 1
        sequence.cached = []
        return shared * self._name_blocks, idle * self._name_blocks

    def evict(self, room_blocks: int) -> None:
        """Let unused blocks go until at most so many are left."""
        while len(self._unused) * self._name_blocks > room_blocks:
            self._unused.popitem(last=False)
