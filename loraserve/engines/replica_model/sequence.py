"""What a replica is limited by, and one request inside it."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from placement.types import VersionId

if TYPE_CHECKING:
    from loraserve.engines.replica_model.prefix import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """What one engine instance holds, as vLLM V1 names it.

    The KV cache has `kv_blocks` of `block_tokens` tokens; `hash_block_tokens` is how many tokens one of a
    request's `hash_ids` names. A batch has at most `adapter_slots` different adapters; the host pool at most
    `pool_adapters` of them and `pool_bytes` (0: no limit). What becomes active crosses a link of
    `load_bytes_per_s`, one adapter after the other. ValueError names what cannot be.
    """

    kv_blocks: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_tokens: int = 16
    hash_block_tokens: int = 512
    adapter_slots: int = 8
    pool_adapters: int = 0
    pool_bytes: int = 0
    load_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("kv_blocks", "max_num_seqs", "block_tokens", "hash_block_tokens", "adapter_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens}; expected at least max_num_seqs = "
                f"{self.max_num_seqs}, so that every sequence may decode in each step"
            )
        if self.hash_block_tokens % self.block_tokens:
            raise ValueError(
                f"hash_block_tokens: {self.hash_block_tokens}; expected a multiple of block_tokens = "
                f"{self.block_tokens}"
            )
        if not self.load_bytes_per_s > 0:
            raise ValueError(f"load_bytes_per_s: {self.load_bytes_per_s}; expected more than 0")

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether a request of these lengths could ever be computed."""
        # The last token drawn is never computed.
        return prompt_tokens + output_tokens - 1 <= self.kv_blocks * self.block_tokens


class Phase(Enum):
    """Where a sequence is. QUEUED: on its way, waiting for its adapter or for room; PREFILL, DECODE: in the
    batch; ENDED: has drawn everything, was cancelled or lost its replica."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


class Sequence:
    """One request in a replica; `request` is the caller's number for it, `owner` whatever it likes.

    The model fills `first_ps` and `last_ps`, the ends of the steps that drew its first and its last token
    (-1: not yet), and `drawn`, the tokens drawn up to the last change of phase. `version` None is the base
    model. `output_tokens` is what it will draw in all, `drawn` may begin above 0 for one that was drawn in
    part elsewhere: that part is then computed like a prompt.
    """

    __slots__ = (
        "cached",
        "computed",
        "drawn",
        "finish_step",
        "first_ps",
        "first_step",
        "hash_ids",
        "known",
        "last_ps",
        "output_tokens",
        "owner",
        "phase",
        "prompt_tokens",
        "rank",
        "request",
        "version",
    )

    def __init__(
        self,
        request: int,
        prompt_tokens: int,
        output_tokens: int,
        rank: int = 0,
        version: VersionId | None = None,
        hash_ids: tuple[int, ...] = (),
        owner: object = None,
        drawn: int = 0,
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.rank = rank
        self.version = version
        self.hash_ids = hash_ids
        self.owner = owner
        self.drawn = drawn
        self.phase = Phase.QUEUED
        self.first_ps = -1
        self.last_ps = -1
        # The tokens to compute before the next one is drawn, and how many of them are in the KV cache.
        self.known = prompt_tokens + drawn
        self.computed = 0
        # Its first blocks, as far as they have a name in the prefix cache.
        self.cached: list[Block] = []
        # While decoding: the steps that drew the first token of this stretch and will draw the last one.
        self.first_step = -1
        self.finish_step = -1
