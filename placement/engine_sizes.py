"""How an engine's LoRA sizes follow from its memory and the registered adapters: one rule, pure.

Owns the rule and what a slot costs. Knows no configuration, no model files and no engine: a slot that is
padded costs the highest rank the engine takes, one that is not costs its adapter's own rank.

The rule, in its order:

1. `max_lora_rank`: the smallest rank that vLLM allows and that covers every registered adapter. Nothing
   registered: 64 where slots are padded. Where they are not, a high limit costs nothing: never below 128.
2. `pool_adapters`: as many as `pool_bytes` holds of the smallest registered adapter, at most 4096. Bytes are
   bounded of themselves: the number must not keep out what they would let in.
3. `slots.machine`: one for each registered adapter, at least 8, at most `max_num_seqs` and `pool_adapters`;
   of these as many as `slot_bytes` holds with the costliest adapters active together. A slot that no
   registered adapter is there for costs the highest rank.

Never fewer than one of each, also where memory does not suffice for it: an engine without a slot serves no
adapter, and the reason then says what is missing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RANK_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PADDED_RANK_AT_FIRST = 64
TRUE_RANK_AT_LEAST = 128
SLOTS_AT_LEAST = 8
MAX_POOL_ADAPTERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """A registered adapter: its largest rank, and its bytes in the pool."""

    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeInputs:
    """What the rule looks at.

    `bytes_per_rank`: what one rank of one adapter takes in a slot if it targets every module; 0 if that is
    not known, and then slots cost nothing. `num_spare_slots` are allocated and never filled. A limit that
    is not None is given and not chosen.
    """

    adapters: Sequence[AdapterSize]
    bytes_per_rank: int
    slot_bytes: int
    pool_bytes: int
    max_num_seqs: int
    is_padded: bool
    num_spare_slots: int = 0
    max_lora_rank: int | None = None
    adapter_slots: int | None = None
    pool_adapters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """vLLM's max_lora_rank and max_loras, how many adapters the pool holds, and why these."""

    max_lora_rank: int
    adapter_slots: int
    pool_adapters: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotUse:
    """The bytes of a slot with an adapter of this rank: what it takes, and what of that is no padding."""

    rank: int
    allocated_bytes: int
    used_bytes: int

    @property
    def padding_bytes(self) -> int:
        """What holds zeros."""
        return self.allocated_bytes - self.used_bytes


def slot_uses(
    ranks: Iterable[int], *, max_lora_rank: int, bytes_per_rank: int, is_padded: bool
) -> tuple[SlotUse, ...]:
    """What slots with adapters of these ranks cost, in their order; ValueError for one above the maximum."""
    uses = []
    for rank in ranks:
        if not 0 <= rank <= max_lora_rank:
            raise ValueError(f"rank {rank}: expected 0 to max_lora_rank = {max_lora_rank}")
        allocated = max_lora_rank if is_padded else rank
        use = SlotUse(rank=rank, allocated_bytes=allocated * bytes_per_rank, used_bytes=rank * bytes_per_rank)
        uses.append(use)
    return tuple(uses)


def choose_sizes(inputs: SizeInputs) -> EngineSizes:
    """The sizes by the rule in this module's docstring."""
    rank = inputs.max_lora_rank or _rank(inputs)
    pool = inputs.pool_adapters or _pool(inputs)
    wanted = min(inputs.max_num_seqs, pool, max(SLOTS_AT_LEAST, len(inputs.adapters)))
    fitting = _fitting(inputs, rank, wanted)
    return EngineSizes(
        max_lora_rank=rank,
        adapter_slots=inputs.adapter_slots or max(1, fitting),
        pool_adapters=pool,
        reason=_reason(inputs, max_rank=rank, fitting=fitting),
    )


def _rank(inputs: SizeInputs) -> int:
    at_least = 0 if inputs.is_padded else TRUE_RANK_AT_LEAST
    if not inputs.adapters:
        at_least = max(at_least, PADDED_RANK_AT_FIRST)
    highest = max((adapter.rank for adapter in inputs.adapters), default=0)
    needed = max(at_least, highest)
    if needed > RANK_STEPS[-1]:
        raise ValueError(f"rank {needed}: engines take at most {RANK_STEPS[-1]}")
    return next(step for step in RANK_STEPS if step >= needed)


def _pool(inputs: SizeInputs) -> int:
    if not inputs.adapters:
        return MAX_POOL_ADAPTERS
    smallest = max(1, min(adapter.size_bytes for adapter in inputs.adapters))
    return max(1, min(MAX_POOL_ADAPTERS, inputs.pool_bytes // smallest))


def _fitting(inputs: SizeInputs, max_rank: int, wanted: int) -> int:
    """How many of the wanted slots the memory holds, whichever adapters are active in them."""
    ranks = sorted((min(adapter.rank, max_rank) for adapter in inputs.adapters), reverse=True)
    ranks += [max_rank] * (wanted - len(ranks))
    uses = slot_uses(
        ranks[:wanted],
        max_lora_rank=max_rank,
        bytes_per_rank=inputs.bytes_per_rank,
        is_padded=inputs.is_padded,
    )
    left_bytes = inputs.slot_bytes - inputs.num_spare_slots * max_rank * inputs.bytes_per_rank
    fitting = 0
    for use in uses:
        left_bytes -= use.allocated_bytes
        if left_bytes < 0:
            break
        fitting += 1
    return fitting


def _reason(inputs: SizeInputs, *, max_rank: int, fitting: int) -> str:
    highest = max((adapter.rank for adapter in inputs.adapters), default=0)
    ranks = f", ranks up to {highest}" if highest else ""
    registered = f"{len(inputs.adapters)} adapters registered{ranks}"
    if not inputs.bytes_per_rank:
        return f"{registered}; what a slot costs is not known"
    how = "padded" if inputs.is_padded else "at their own rank"
    one = f"{max_rank * inputs.bytes_per_rank} bytes at rank {max_rank}"
    given = f"{inputs.slot_bytes} given" + ("" if fitting else ", which is less than one slot needs")
    return f"{registered}; slots are {how}, {one}; {given}"
