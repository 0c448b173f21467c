"""The prefix cache: which blocks of prompts are in the KV cache and may be shared, as vLLM V1 keeps them.

Counts blocks, holds no tokens. A block is named by a hash of everything up to it, as vLLM and Mooncake's
traces do, so equal names mean equal prefixes; what one adapter has computed is of no use to another, so
the version is part of the name, as in vLLM. Who needs a block takes one without a name, and when there is
none, the named one that has been out of use for longest, which loses its name.
"""

from collections import OrderedDict

from loraserve.engines.replica_model.sequence import ReplicaLimits, Sequence
from placement.types import VersionId

Name = tuple[VersionId | None, int] | tuple[int, int]
"""A name out of the trace with the version, or of a block that only one request could have: (request,
place)."""


class Block:
    """KV blocks that have one name, and how many sequences use them."""

    __slots__ = ("name", "users")

    def __init__(self, name: Name) -> None:
        self.name = name
        self.users = 1


class PrefixCache:
    """Named blocks, in use and not, and how many free KV blocks have no name."""

    def __init__(self, limits: ReplicaLimits, free_blocks: int) -> None:
        self._name_tokens = limits.hash_block_tokens
        self._name_blocks = limits.hash_block_tokens // limits.block_tokens
        self._by_name: dict[Name, list[Block]] = {}
        """More than one where several sequences computed the same prefix side by side."""
        self._unused: OrderedDict[Block, None] = OrderedDict()
        """In the order in which they came out of use."""
        self._nameless_blocks = free_blocks

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody uses."""
        return self._nameless_blocks + len(self._unused) * self._name_blocks

    @property
    def used_blocks(self) -> int:
        """KV blocks with a name that somebody uses, each counted once."""
        named = (block for blocks in self._by_name.values() for block in blocks)
        return sum(self._name_blocks for block in named if block.users)

    def match(self, sequence: Sequence) -> tuple[list[Block], int]:
        """The sequence's first blocks that are here, and how many KV blocks of them are in use.

        At least one token is left to compute, for somebody must draw the next one.
        """
        matched: list[Block] = []
        used = 0
        for place in range((sequence.known - 1) // self._name_tokens):
            found = self._by_name.get(_name(sequence, place, self._name_tokens))
            if not found:
                break
            matched.append(found[0])
            if found[0].users:
                used += self._name_blocks
        return matched, used

    def take(self, sequence: Sequence, blocks: list[Block]) -> tuple[int, int]:
        """Let the sequence use its first blocks; the tokens they hold, and the KV blocks that nobody used
        before."""
        fresh = 0
        for block in blocks:
            if block.users == 0:
                del self._unused[block]
                fresh += self._name_blocks
            block.users += 1
        sequence.cached = blocks
        tokens = len(blocks) * self._name_tokens
        return tokens, fresh

    def allocate(self, num_blocks: int) -> None:
        """Take so many free KV blocks; below 0, put so many back."""
        self._nameless_blocks -= num_blocks
        while self._nameless_blocks < 0:
            block, _ = self._unused.popitem(last=False)
            self._nameless_blocks += self._name_blocks
            same = self._by_name[block.name]
            same.remove(block)
            if not same:
                del self._by_name[block.name]

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Name the full blocks of the sequence's first so many tokens, those being computed included."""
        for place in range(len(sequence.cached), num_tokens // self._name_tokens):
            block = Block(_name(sequence, place, self._name_tokens))
            self._by_name.setdefault(block.name, []).append(block)
            sequence.cached.append(block)

    def release(self, sequence: Sequence, private_blocks: int) -> int:
        """Take back the sequence's uses and its blocks without a name; the named KV blocks that nobody uses
        now.

        The end of a sequence is taken before its beginning.
        """
        self._nameless_blocks += private_blocks
        idle = 0
        for block in reversed(sequence.cached):
            block.users -= 1
            if block.users == 0:
                self._unused[block] = None
                idle += self._name_blocks
        sequence.cached = []
        return idle


def _name(sequence: Sequence, place: int, name_tokens: int) -> Name:
    """The name of one of the sequence's blocks; what the trace does not name is its own."""
    if place < len(sequence.hash_ids) and (place + 1) * name_tokens <= sequence.prompt_tokens:
        return sequence.version, sequence.hash_ids[place]
    return sequence.request, place
