"""What a step of a batch costs and what is in it by rank, kept up as sequences come and go."""

from collections.abc import Iterable

from loraserve.engines.replica_model.sequence import Phase, Sequence
from placement.latency import RankKernel, StepCost
from placement.routing.chooser import RankLoad
from placement.types import VersionId


class RankMembers:
    """All sequences of a batch and its queue by rank, as reports tell them."""

    __slots__ = ("_by_rank", "_loads")

    def __init__(self, members: Iterable[Sequence]) -> None:
        self._by_rank: dict[int, RankLoad] = {}
        self._loads: tuple[RankLoad, ...] | None = None
        for sequence in members:
            self.join(sequence)
            if sequence.phase is Phase.DECODE:
                self.draw(sequence)

    def join(self, sequence: Sequence) -> None:
        """One is there that has its next token yet to come."""
        self._add(sequence.rank, 0, 1, sequence.known)

    def draw(self, sequence: Sequence) -> None:
        """One of these has drawn a token, and decodes."""
        self._add(sequence.rank, 1, -1, -sequence.known)

    def leave(self, sequence: Sequence) -> None:
        """One is there no more; it still has the phase that it had."""
        if sequence.phase is Phase.DECODE:
            self._add(sequence.rank, -1, 0, 0)
        else:
            self._add(sequence.rank, 0, -1, -sequence.known)

    def loads(self) -> tuple[RankLoad, ...]:
        """The ranks of which any is there, the lowest first."""
        if self._loads is None:
            self._loads = tuple([self._by_rank[rank] for rank in sorted(self._by_rank)])
        return self._loads

    def _add(self, rank: int, running: int, waiting: int, prefill_tokens: int) -> None:
        self._loads = None
        known = self._by_rank.get(rank)
        if known is not None:
            _, were_running, were_waiting, were_tokens = known
            running += were_running
            waiting += were_waiting
            prefill_tokens += were_tokens
        if running or waiting:
            self._by_rank[rank] = RankLoad(rank, running, waiting, prefill_tokens)
        else:
            del self._by_rank[rank]


class BatchRanks:
    """The adapters of the decoding rows: rows per rank and per version, and the sum of their ranks."""

    __slots__ = ("by_rank", "by_version", "rank_sum", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self.rank_sum = 0
        self.by_rank: dict[int, int] = {}
        self.by_version: dict[VersionId, int] = {}

    def add(self, sequence: Sequence) -> None:
        """A row begins to decode; one of the base model counts for nothing here."""
        version = sequence.version
        if version is None:
            return
        rank = sequence.rank
        self.rows += 1
        self.rank_sum += rank
        self.by_rank[rank] = self.by_rank.get(rank, 0) + 1
        self.by_version[version] = self.by_version.get(version, 0) + 1

    def discard(self, sequence: Sequence) -> None:
        """A row decodes no more."""
        version = sequence.version
        if version is None:
            return
        rank = sequence.rank
        self.rows -= 1
        self.rank_sum -= rank
        if self.by_rank[rank] == 1:
            del self.by_rank[rank]
        else:
            self.by_rank[rank] -= 1
        if self.by_version[version] == 1:
            del self.by_version[version]
        else:
            self.by_version[version] -= 1


class StepPricer:
    """The latency model over a batch; `prefill_tokens` and `max_rank` are those of the last step priced."""

    __slots__ = ("_cost", "max_rank", "prefill_tokens")

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self.max_rank = 0
        self.prefill_tokens = 0

    def decode_ps(self, rows: int, context_tokens: int, ranks: BatchRanks) -> int:
        """A step in which every row decodes."""
        cost = self._cost
        ps = cost.base + cost.row * rows + cost.context_token * context_tokens
        if not ranks.rows:
            self.max_rank = 0
            return ps
        self.max_rank = max_rank = max(ranks.by_rank)
        if cost.kernel is RankKernel.SUM:
            charged = ranks.rank_sum
        elif cost.kernel is RankKernel.PADDED_BATCH:
            charged = ranks.rows * max_rank
        else:
            charged = ranks.rows * cost.max_lora_rank
        return ps + cost.lora_step + cost.adapter * len(ranks.by_version) + cost.decode_rank * charged

    def mixed_ps(
        self, rows: int, context_tokens: int, ranks: BatchRanks, chunks: list[tuple[Sequence, int]]
    ) -> int:
        """A step in which `rows` decode and prompts are computed in chunks."""
        cost = self._cost
        tokens_sum = pairs = lora_tokens = rank_sum = 0
        max_rank = max(ranks.by_rank) if ranks.rows else 0
        versions: set[VersionId] | None = None
        for sequence, tokens in chunks:
            tokens_sum += tokens
            pairs += tokens * sequence.computed + tokens * (tokens - 1) // 2
            if sequence.version is None:
                continue
            lora_tokens += tokens
            rank_sum += tokens * sequence.rank
            if sequence.rank > max_rank:
                max_rank = sequence.rank
            if sequence.version not in ranks.by_version:
                versions = {sequence.version} if versions is None else versions | {sequence.version}
        self.prefill_tokens, self.max_rank = tokens_sum, max_rank
        ps = (
            cost.base
            + cost.row * (rows + len(chunks))
            + cost.context_token * context_tokens
            + cost.prefill_token * tokens_sum
            + cost.prefill_pair * pairs
        )
        adapters = len(ranks.by_version) + (len(versions) if versions else 0)
        if not adapters:
            return ps
        if cost.kernel is RankKernel.SUM:
            decode, prefill = ranks.rank_sum, rank_sum
        else:
            charged = max_rank if cost.kernel is RankKernel.PADDED_BATCH else cost.max_lora_rank
            decode, prefill = ranks.rows * charged, lora_tokens * charged
        return (
            ps
            + cost.lora_step
            + cost.adapter * adapters
            + cost.decode_rank * decode
            + cost.prefill_rank * prefill
        )
