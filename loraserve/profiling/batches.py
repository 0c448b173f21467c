"""Which batches are timed, so that every term of the latency model varies without the others.

Pure. A batch is sequences that decode side by side and, while they do, prompts that are computed in one step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

SHORT_CONTEXT = 8
MAX_ROWS = 32
_MAX_PROMPT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedName:
    """An adapter by the name it has here."""

    name: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`decode` has one entry per decoding sequence, its adapter's name or None for the base model, each with
    a prompt of `context_tokens`; `prompts` are (tokens, adapter) of those computed beside, in one step."""

    name: str
    decode: tuple[str | None, ...]
    context_tokens: int = SHORT_CONTEXT
    prompts: tuple[tuple[int, str | None], ...] = ()

    @property
    def adapters(self) -> frozenset[str]:
        """The different adapters in it."""
        return frozenset(one for one in (*self.decode, *(adapter for _, adapter in self.prompts)) if one)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts computed in the step."""
        return sum(tokens for tokens, _ in self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What the engine takes: rows and tokens in a step, tokens of one sequence, adapters in a batch."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len_tokens: int
    adapter_slots: int


def plan_batches(adapters: Sequence[RankedName], limits: BatchLimits, *, quick: bool) -> tuple[Batch, ...]:
    """The batches that fit the limits, in the order of the terms they are for."""
    by_rank: dict[int, list[str]] = {}
    for adapter in adapters:
        by_rank.setdefault(adapter.rank, []).append(adapter.name)
    most = min(MAX_ROWS, limits.max_num_seqs - 2)
    rows = [count for count in ((1, 4, 16) if quick else (1, 2, 4, 8, 16, 32)) if count <= most] or [1]
    longest = min(_MAX_PROMPT, limits.max_model_len_tokens // 2, limits.max_num_batched_tokens - most)
    prompts = [tokens for tokens in ((16, 128) if quick else (16, 64, 128, 256, 512)) if tokens <= longest]
    planned = [*_base_batches(rows, prompts, longest), *_rank_batches(by_rank, rows, prompts)]
    if len(by_rank) > 1:
        planned += _mixed_batches(by_rank, rows, prompts)
    fitting = [batch for batch in planned if _fits(batch, limits)]
    return tuple({batch.name: batch for batch in fitting}.values())


def _base_batches(rows: Sequence[int], prompts: Sequence[int], longest: int) -> Iterator[Batch]:
    for count in rows:
        yield Batch(name=f"decode {count} base", decode=(None,) * count)
    for count in {rows[0], rows[len(rows) // 2]}:
        yield Batch(name=f"decode {count} base long", decode=(None,) * count, context_tokens=longest)
    for tokens in prompts:
        yield Batch(name=f"prompt {tokens} base", decode=(None,), prompts=((tokens, None),))
    for tokens in prompts[1:2]:
        yield Batch(name=f"prompts 2 x {tokens} base", decode=(None,), prompts=((tokens, None),) * 2)


def _rank_batches(
    by_rank: dict[int, list[str]], rows: Sequence[int], prompts: Sequence[int]
) -> Iterator[Batch]:
    for rank, names in sorted(by_rank.items()):
        for count in rows[:: 1 if len(rows) < 4 else 2]:
            yield Batch(name=f"decode {count} r{rank}", decode=(names[0],) * count)
        if len(names) > 1:
            several = tuple(islice(cycle(names), rows[-1]))
            yield Batch(name=f"decode {rows[-1]} r{rank} on {len(names)}", decode=several)
        for tokens in prompts[:3]:
            yield Batch(name=f"prompt {tokens} r{rank}", decode=(None,), prompts=((tokens, names[0]),))


def _mixed_batches(
    by_rank: dict[int, list[str]], rows: Sequence[int], prompts: Sequence[int]
) -> Iterator[Batch]:
    """What tells the kernels apart: low ranks beside high ones, and beside the base model."""
    ranks = sorted(by_rank)
    low, high, middle = by_rank[ranks[0]], by_rank[ranks[-1]], by_rank[ranks[len(ranks) // 2]]
    everyone = [names[0] for _, names in sorted(by_rank.items())]
    for count in (one for one in rows if one > 1):
        half = count // 2
        mixes: dict[str, tuple[str | None, ...]] = {
            "half low half high": (low[0],) * half + (high[0],) * half,
            "low and one high": (low[0],) * (count - 1) + (high[0],),
            "high and one low": (high[0],) * (count - 1) + (low[0],),
            "low and middle": (low[0],) * half + (middle[0],) * half,
            "base and one high": (None,) * (count - 1) + (high[0],),
            "all ranks": tuple(islice(cycle(everyone), count)),
        }
        for name, decode in mixes.items():
            yield Batch(name=f"decode {count} {name}", decode=decode)
    for tokens in prompts[:2]:
        both = ((tokens, low[0]), (tokens, high[0]))
        yield Batch(name=f"prompts {tokens} low and high", decode=(None,), prompts=both)
        yield Batch(name=f"prompt {tokens} low beside high", decode=(high[0],), prompts=((tokens, low[0]),))
        yield Batch(
            name=f"prompt {tokens} high beside low", decode=(low[0],) * 3, prompts=((tokens, high[0]),)
        )
        yield Batch(name=f"prompt {tokens} base beside high", decode=(high[0],), prompts=((tokens, None),))


def _fits(batch: Batch, limits: BatchLimits) -> bool:
    rows = len(batch.decode) + len(batch.prompts)
    return (
        rows <= limits.max_num_seqs
        and len(batch.decode) + batch.prompt_tokens <= limits.max_num_batched_tokens
        and len(batch.adapters) <= limits.adapter_slots
    )
