"""What one request more would cost at a replica, worked out from the definition each time and step by step.

`placement.routing.marginal_cost_gauge` keeps coefficients of the same up to date.
"""

import math

from placement.latency import RankKernel
from placement.routing.chooser import OwnRequests, ReplicaLoad
from placement.routing.marginal_cost_gauge import (
    AHEAD,
    BUSY,
    CROWD,
    FULL_KV,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SPREAD_ROWS,
)
from placement.routing.replica_cost import ReplicaCost

RANKS = (0, 8, 16, 64, 128)
"""Ranks that there may be."""


def counts_of(load: ReplicaLoad, own: OwnRequests, peers: float) -> dict[int, float]:
    """Requests there by rank."""
    reported = {one.rank: one.running + one.waiting for one in load.ranks}
    found = {}
    for rank in RANKS:
        now, then = own.ranks.get(rank, 0), own.reported.get(rank, 0)
        others = max(0.0, reported.get(rank, 0) - then + peers * (now - then))
        found[rank] = others + now + own.leased.get(rank, 0)
    return found


def padding_of(counts: dict[int, float], rank: int) -> tuple[float, float]:
    """The rank charged on average over a request's life, and how much of it is the request's doing."""
    charged, raised = float(rank), 0.0
    for level in range(max(RANKS)):
        # One of the m requests above this level is there for m / (m + 1) of the time.
        above = sum(number for other, number in counts.items() if other > level)
        if level >= rank:
            charged += above / (above + 1)
        else:
            raised += 1 / (above + 1)
    return charged, raised


def plain_cost_ms(
    load: ReplicaLoad,
    own: OwnRequests,
    peers: float,
    cost: ReplicaCost,
    rank: int,
    prompt: int,
    output: int,
    age_s: float,
) -> float:
    """The cost of one request more, see the docstring of `placement.routing.marginal_cost_gauge`."""
    model, counts = cost.latency, counts_of(load, own, peers)
    rows, mean_prompt, mean_output = (
        sum(counts.values()),
        load.prompt_tokens or PROMPT_TOKENS,
        load.output_tokens or OUTPUT_TOKENS,
    )
    length = mean_prompt + mean_output / 2
    seats = min(cost.max_num_seqs, cost.kv_tokens / length)
    if load.waiting and load.kv_cache_usage > FULL_KV:
        seats = min(seats, load.running)
    seats = max(1.0, seats)
    batch = min(rows + 1, seats)
    share = batch / (rows + 1)
    adapter_rows = rows - counts[0]
    adapters = adapter_rows + (rank > 0)
    charged, raised = padding_of(counts, rank) if model.kernel is RankKernel.PADDED_BATCH else (0.0, 0.0)
    there = sum(level * number for level, number in counts.items())
    own_rank, others_rank, rank_rows = {
        RankKernel.PADDED_BATCH: (charged, charged, adapters * charged),
        RankKernel.PADDED_CONFIG: (128.0, 128.0, adapters * 128.0),
        RankKernel.SUM: (rank, there / adapter_rows if adapter_rows else 0.0, there + rank),
    }[model.kernel]
    own_rank = own_rank if rank else 0.0
    row_ms = model.row_ms + model.context_token_ms * length
    decode = model.base_ms + row_ms * batch + model.decode_rank_ms * rank_rows * share
    if adapters:
        decode += model.lora_step_ms + model.adapter_ms * min(adapters * share, cost.adapter_slots)
    prompts = (batch - 1) * mean_prompt / mean_output
    added = row_ms + raised * (model.decode_rank_ms * adapter_rows * share + model.prefill_rank_ms * prompts)
    if rank:
        added += model.decode_rank_ms * own_rank + model.adapter_ms
    others_ms = model.prefill_token_ms + model.prefill_rank_ms * others_rank
    own_ms = model.prefill_token_ms + model.prefill_rank_ms * own_rank
    waiting = SPREAD_ROWS * math.log1p(math.exp((rows + 1 - seats) / SPREAD_ROWS))
    queue = waiting * (mean_output * decode + batch * mean_prompt * others_ms) / seats
    tokens: float = sum(one.prefill_tokens for one in load.ranks) + sum(own.leased_tokens.values())
    tokens += (1 + peers) * sum(own.sent_tokens.values())
    ahead = tokens * (others_ms + decode / cost.max_num_batched_tokens) - 1e3 * age_s
    delayed = rows + BUSY * waiting
    weighed = (1 + (AHEAD - 1) / (1 + waiting / CROWD)) * queue
    found = max(weighed, (1 + (AHEAD - 1) / (1 + waiting)) * ahead) + BUSY * queue + 1.5 * decode
    found += prompt * (own_ms * (1 + delayed) + decode / cost.max_num_batched_tokens)
    found += 0.5 * model.prefill_pair_ms * (1 + delayed) * prompt**2
    return found + output * (decode + prompts * others_ms + delayed * added)
