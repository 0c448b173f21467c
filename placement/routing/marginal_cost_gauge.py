"""What one more request would cost at one replica: its own delay there and what it adds to that of others.

Owns the estimate for one replica, from what a router knows of it; `placement.routing.marginal_cost` chooses
by it.

The estimate is the marginal cost of a queue whose members share one server (its engine's steps): what a
further request waits and takes, and how much longer everything takes because of it, times those whom that
delays. It is in milliseconds of somebody's waiting. Requests are taken to live exponentially long and to be
replaced when they end, so that what holds now holds on average while the request is there.

A router asks for it several times per request, and nearly every time something has changed. So nothing is
looked at twice: counts are kept by rank, and since all that rank does is linear in the rank that the kernel
charges, one set of coefficients serves every request until the next change.
"""

from math import exp, log1p

from placement.latency import RankKernel
from placement.routing.replica_cost import ReplicaCost
from placement.routing.view import OwnRequests, ReplicaLoad

PROMPT_TOKENS = 512.0
OUTPUT_TOKENS = 128.0
"""Lengths that are taken where neither the request nor the replica tells any."""

SPREAD_ROWS = 2.0
"""How far the number of requests there may be from what it seems: so near to a full batch, some will wait."""

BUSY = 3.0
"""How many of those who come later a wait delays for each that waits now: load / (1 - load) at a load of
0.75. It counts the more the longer the queue; by experiment 2 to 8 do about equally well."""

AHEAD = 12.0
"""How many times what a wait for the prompts ahead counts, where nobody waits for a place in the batch:
nothing comes before the first token, while other delays are spread over an output. By experiment 8 to 16 do
about equally well at low and middle load, and have a lower TTFT p95 than 1. The more wait, the less it
counts: near saturation a place in the batch is what is short."""

CROWD = 4.0
"""A wait for a place in the batch counts as much as one for prompts while nobody waits, and half as much once
so many do. By experiment (two to ten of them) that lowers the TTFT p95 near saturation, most where replicas
are set to different ranks: a place that is free elsewhere is worth slower steps."""

FULL_KV = 0.95

NO_REQUESTS = OwnRequests()
"""What a router has at a replica that it never sent anything; nobody changes it."""


Terms = tuple[float, float, float, float, float, float, float, float, float, float, float, float]
"""A request's cost in ms by what the kernel charges it for, its prompt and its output tokens.

Pairs of a constant and what comes to it per charged rank: the wait for a place in the batch, the wait for the
prompts ahead, with by how much that is less per second that the report is old (the longer of these two waits
counts), what does not depend on lengths, per prompt token; then what comes per square of the prompt, and the
pair per output token. A plain tuple, which is made and read fastest; `cost_ms` puts it together.
"""

NO_TERMS: Terms = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def cost_ms(
    terms: Terms, charged: float, prompt_tokens: float, output_tokens: float, age_s: float = 0.0
) -> float:
    """The cost of one request, by a report so old."""
    queue, queue_rank, ahead, ahead_rank, aged, fixed, fixed_rank, *lengths = terms
    prompt, prompt_rank, pair, output, output_rank = lengths
    return (
        max(queue + queue_rank * charged, ahead + ahead_rank * charged - aged * max(0.0, age_s))
        + (fixed + fixed_rank * charged)
        + (prompt + prompt_rank * charged + pair * prompt_tokens) * prompt_tokens
        + (output + output_rank * charged) * output_tokens
    )


class Gauge:
    """One replica as one router sees it.

    `update` has to be called when the report or the stamp of the router's own requests is not that of the
    last time, or its peers are not. Then `terms` has the cost of a request for an adapter, and `charged` the
    rank that the kernel charges one of each rank for; `charge` knows every rank. The mean lengths are those
    of requests there.
    """

    __slots__ = (
        "_adapter_rows",
        "_base",
        "_cost",
        "_counts",
        "_index",
        "_is_padded",
        "_is_sum",
        "_levels",
        "_load_tokens",
        "_mean_charged",
        "_peers",
        "_prefill_tokens",
        "_prompts_ms",
        "_rank_rows",
        "_rates",
        "_reported",
        "_rows",
        "_step_ms",
        "charged",
        "load",
        "output_tokens",
        "own",
        "prompt_tokens",
        "stamp",
        "terms",
    )

    def __init__(self, cost: ReplicaCost) -> None:
        model = cost.latency
        self._cost = cost
        self._is_sum = model.kernel is RankKernel.SUM
        self._is_padded = model.kernel is RankKernel.PADDED_BATCH
        # All numbers are floats, whole or not: sums of two kinds take longer.
        self._prompts_ms = (
            float(model.prefill_token_ms),
            float(model.prefill_rank_ms),
            0.5 * model.prefill_pair_ms,
            1.0 / cost.max_num_batched_tokens,
        )
        step_ms = (model.base_ms, model.lora_step_ms, model.adapter_ms, model.decode_rank_ms)
        base_ms, lora_step_ms, adapter_ms, rank_ms = map(float, step_ms)
        self._step_ms = (base_ms, lora_step_ms, adapter_ms, rank_ms, float(cost.adapter_slots))
        # Ranks from high to low, 0 last, each with how far it is above the next; the others go with it.
        self._levels: list[tuple[int, float]] = [(0, 0.0)]
        self._index: dict[int, int] = {0: 0}
        self._reported: list[float] = [0.0]
        self._counts: list[float] = [0.0]
        self._load_tokens = 0
        self._prefill_tokens = self._rows = self._adapter_rows = self._rank_rows = 0.0
        self._peers = self._mean_charged = 0.0
        self._base: Terms | None = None
        self._rates = (1.0, 0.0, 1.0, OUTPUT_TOKENS, PROMPT_TOKENS)
        self.charged: dict[int, float] = {}
        self.load: ReplicaLoad | None = None
        self.own = NO_REQUESTS
        self.stamp = -1
        self.prompt_tokens = PROMPT_TOKENS
        self.output_tokens = OUTPUT_TOKENS
        self.terms: Terms = NO_TERMS

    def update(self, load: ReplicaLoad, own: OwnRequests, peers: float) -> None:
        """Take what has changed into account."""
        # The router's own requests may still come to be known.
        stamp = -1 if own is NO_REQUESTS else own.stamp
        if load is not self.load:
            self._take_report(load)
            self._take_own(own, peers)
        elif stamp == self.stamp and peers == self._peers:
            return
        elif stamp != self.stamp + 1 or peers != self._peers or own.changed_rank not in self._index:
            self._take_own(own, peers)
        else:
            self._count(own.changed_rank, own, peers)
        self.own, self.stamp, self._peers, self._base = own, stamp, peers, None
        tokens = self._load_tokens + own.num_leased_tokens
        self._prefill_tokens = tokens + (1.0 + peers) * own.num_sent_tokens
        self._add_up()
        self.terms = self._terms(1.0)

    def charge(self, rank: int) -> float:
        """What the kernel charges a request of this rank for, on average over its life."""
        found = self.charged.get(rank)
        if found is None:
            self._learn(rank)
            self._add_up()
            found = self.charged[rank]
        return found

    def base_terms(self) -> Terms:
        """The cost of a request for the base model."""
        if self._base is None:
            self._base = self._terms(0.0)
        return self._base

    # -- what is there -------------------------------------------------------------------------

    def _learn(self, rank: int) -> None:
        """Make room for a rank that was not seen here before."""
        reported = {known: self._reported[at] for known, at in self._index.items()}
        counts = {known: self._counts[at] for known, at in self._index.items()}
        ranks = sorted({*self._index, rank}, reverse=True)
        lower = [*ranks[1:], 0]
        self._levels = [(high, float(high - low)) for high, low in zip(ranks, lower, strict=True)]
        self._index = {known: at for at, known in enumerate(ranks)}
        self._reported = [reported.get(known, 0.0) for known in ranks]
        self._counts = [counts.get(known, 0.0) for known in ranks]

    def _take_report(self, load: ReplicaLoad) -> None:
        self.load = load
        self._reported = reported = [0.0] * len(self._levels)
        index, tokens = self._index, 0
        for rank, running, waiting, prefill_tokens in load.ranks:
            if rank not in index:
                self._learn(rank)
                reported, index = self._reported, self._index
            reported[index[rank]] = running + waiting + 0.0
            tokens += prefill_tokens
        self._load_tokens = tokens
        self.prompt_tokens = prompt = load.prompt_tokens or PROMPT_TOKENS
        self.output_tokens = output = load.output_tokens or OUTPUT_TOKENS
        cost = self._cost
        model = cost.latency
        # By places or by the KV cache.
        length = prompt + output / 2.0
        seats = min(cost.max_num_seqs, cost.kv_tokens / length)
        if load.waiting and load.kv_cache_usage > FULL_KV:
            seats = min(seats, load.running)
        row_ms = model.row_ms + model.context_token_ms * length
        self._rates = (float(max(1.0, seats)), row_ms, prompt / output, output, prompt)

    def _take_own(self, own: OwnRequests, peers: float) -> None:
        now, then, index = own.ranks, own.reported, self._index
        known = index.keys()
        if not (now.keys() <= known and then.keys() <= known and own.leased.keys() <= known):
            for rank in {*now, *then, *own.leased}.difference(index):
                self._learn(rank)
            index = self._index
        if now == then and not own.leased:
            # As always after a report.
            self._counts = counts = self._reported.copy()
            for rank, number in now.items():
                if counts[index[rank]] < number:
                    counts[index[rank]] = float(number)
        else:
            for rank in index:
                self._count(rank, own, peers)

    def _count(self, rank: int, own: OwnRequests, peers: float) -> None:
        """Count the requests of a rank there now: the others' as reported, this router's own as they are.
        What it has sent and had back since the report counts once more for each peer."""
        at = self._index[rank]
        now, then = own.ranks.get(rank, 0), own.reported.get(rank, 0)
        others = self._reported[at] - then + peers * (now - then)
        count = others + now if others > 0.0 else float(now)
        self._counts[at] = count + own.leased[rank] if rank in own.leased else count

    def _add_up(self) -> None:
        """What the kernel makes of the counts.

        A padded batch is charged for the highest rank in it. With m others of at least some rank and lives
        as in the module's docstring, one of them is there for m / (m + 1) of the request's life; for the
        rest of it the request alone makes the batch so high, if it does.
        """
        charged, counts = self.charged, self._counts
        if self._is_padded:
            rows, level = 0.0, float(self._levels[0][0])
            # As many of both.
            for (rank, gap), count in zip(self._levels, counts):  # noqa: B905
                charged[rank] = level
                rows += count
                level -= gap / (rows + 1.0)
            self._rows, self._mean_charged = rows, level
        else:
            self._rows = sum(counts)
            if len(charged) < len(counts):
                highest = float(self._cost.latency.max_lora_rank)
                self.charged = {rank: float(rank) if self._is_sum else highest for rank in self._index}
                self._mean_charged = highest
            self._rank_rows = sum([rank * counts[at] for rank, at in self._index.items()])
        self._adapter_rows = self._rows - counts[-1]

    # -- what one more does --------------------------------------------------------------------

    def _terms(self, lora: float) -> Terms:
        """The cost of one request more, for an adapter (1) or the base model (0)."""
        seats, _, ratio, output, prompt = self._rates
        prefill, prefill_rank, pair, per_token = self._prompts_ms
        rows, tokens = self._rows, self._prefill_tokens
        batch = rows + 1.0
        # What it is on average, as the number of requests there is uncertain.
        excess = (batch - seats) / SPREAD_ROWS
        waiting = SPREAD_ROWS * (excess if excess > 30.0 else log1p(exp(excess)))
        share = 1.0
        if batch > seats:
            batch, share = seats, seats / batch
        decode, decode_rank, others, others_rank, added, added_rank = self._steps(lora, batch, share)
        # While one output is drawn, every place in the batch gets a new prompt once.
        turns = waiting / seats
        draws, prompts = turns * output, turns * batch * prompt
        queue, queue_rank = draws * decode + prompts * others, draws * decode_rank + prompts * others_rank
        # Whoever is there is delayed, and of those who come later the more the longer the queue.
        delayed, prompts = rows + BUSY * waiting, (batch - 1.0) * ratio
        mine, ahead = 1.0 + delayed, 1.0 + (AHEAD - 1.0) / (1.0 + waiting)
        place = 1.0 + (AHEAD - 1.0) / (1.0 + waiting / CROWD)
        token, token_rank = decode * per_token, decode_rank * per_token
        return (
            place * queue,
            place * queue_rank,
            ahead * (tokens * (others + token)),
            ahead * tokens * (others_rank + token_rank),
            1e3 * ahead,
            BUSY * queue + 1.5 * decode,
            BUSY * queue_rank + 1.5 * decode_rank,
            mine * prefill + token,
            mine * prefill_rank * lora + token_rank,
            mine * pair,
            decode + prompts * others + delayed * added,
            decode_rank + prompts * others_rank + delayed * added_rank,
        )

    def _steps(
        self, lora: float, batch: float, share: float
    ) -> tuple[float, float, float, float, float, float]:
        """The engine's steps with one request more, as pairs of a constant and what comes to it per charged
        rank: ms of a decoding step, per prompt token of the others, and by how much the new one prolongs a
        step."""
        base_ms, step_ms, adapter_ms, rank_ms, slots = self._step_ms
        token_ms, token_rank_ms, _, _ = self._prompts_ms
        _, row_ms, ratio, _, _ = self._rates
        adapter_rows = self._adapter_rows
        adapters = adapter_rows + lora
        # Also where the batch is full and it takes another's place, or full replicas would seem the cheaper.
        decode, added = base_ms + row_ms * batch, row_ms + adapter_ms * lora
        if adapters:
            in_batch = adapters * share
            decode += step_ms + adapter_ms * (in_batch if in_batch < slots else slots)
        if self._is_sum:
            others, rank_rows = token_ms, self._rank_rows
            if adapter_rows:
                others += token_rank_ms * rank_rows / adapter_rows
            decode += rank_ms * share * rank_rows
            rank_ms *= lora
            return decode, rank_ms * share, others, 0.0, added, rank_ms
        # A higher rank slows each step for all, decoding or not.
        raised = rank_ms * adapter_rows * share + token_rank_ms * (batch - 1.0) * ratio
        added -= raised * self._mean_charged
        return decode, rank_ms * share * adapters, token_ms, token_rank_ms, added, raised + rank_ms * lora
