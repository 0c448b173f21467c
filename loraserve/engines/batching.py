"""The pure model of continuous batching: a queue, a running batch, one step at a time.

Owns which tokens each step computes and how long it takes by the latency model. Knows no event loop,
no clock, no token values: the emulated engine drives it in real time, a simulator may in virtual time.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from loraserve.config import EmulatedSection


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What one engine holds: sequences per step, tokens per step, tokens in the KV cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_capacity_tokens: int


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request in the batch; `computed_tokens` are in the KV cache, `rank` 0 is the base model."""

    request_id: str
    prompt_tokens: int
    rank: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0

    @property
    def missing_tokens(self) -> int:
        """Tokens to compute before the next one can be drawn; one while decoding."""
        return self.prompt_tokens + self.output_tokens - self.computed_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The tokens of one sequence that one step computes."""

    sequence: Sequence
    num_tokens: int
    is_decode: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step computes."""

    chunks: tuple[Chunk, ...]

    @property
    def prefill_tokens(self) -> int:
        """Tokens computed by chunks that are not a single decode."""
        return sum(chunk.num_tokens for chunk in self.chunks if not chunk.is_decode)

    @property
    def largest_rank(self) -> int:
        """The largest adapter rank in the step, 0 when all rows are the base model's."""
        return max((chunk.sequence.rank for chunk in self.chunks), default=0)


def step_time_s(step: Step, model: EmulatedSection) -> float:
    """Seconds the step takes by the latency model."""
    rows = len(step.chunks)
    milliseconds = (
        model.base_step_ms
        + model.prefill_token_ms * step.prefill_tokens
        + model.decode_seq_ms * rows
        + model.rank_seq_ms * rows * step.largest_rank
    )
    return milliseconds / 1e3 / model.speed


class Batch:
    """Waiting and running sequences under the limits; first come, first served.

    A prompt is computed in chunks that fit the step's token budget. When the KV cache is full, the
    sequence admitted last gives its tokens back and recomputes them later, at the queue's head, so a
    limit of at least one sequence's full length is all that progress needs.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._members: dict[str, Sequence] = {}
        self._kv_tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    @property
    def num_running(self) -> int:
        """Sequences admitted to the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences queued, preempted ones included."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self._kv_tokens / self._limits.kv_capacity_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose id is new to the batch."""
        if sequence.request_id in self._members:
            raise ValueError(f"sequence {sequence.request_id} is already in the batch")
        self._members[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def remove(self, request_id: str) -> bool:
        """Take a sequence out with all it holds, also between schedule and commit; False if absent."""
        sequence = self._members.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._kv_tokens -= sequence.computed_tokens
        return True

    def schedule(self) -> Step:
        """Choose the next step: running sequences first, then the queue while all limits allow."""
        budget = self._limits.max_num_batched_tokens
        room = self._limits.kv_capacity_tokens - self._kv_tokens
        chunks: list[Chunk] = []
        preempted = False
        for sequence in tuple(self._running):
            if budget == 0:
                break
            if sequence not in self._running:
                continue
            num_tokens = min(sequence.missing_tokens, budget)
            while num_tokens > room and sequence in self._running:
                room += self._preempt_last(chunks)
                preempted = True
                budget = self._limits.max_num_batched_tokens - sum(chunk.num_tokens for chunk in chunks)
            if sequence in self._running:
                chunks.append(_chunk(sequence, num_tokens))
                budget -= num_tokens
                room -= num_tokens
        if not preempted:
            self._admit(chunks, budget, room)
        return Step(chunks=tuple(chunks))

    def commit(self, step: Step) -> list[Sequence]:
        """Account the step as done; returns the sequences that now draw their next token.

        The caller draws it at once: `output_tokens` already counts it.
        """
        drawn = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            if self._members.get(sequence.request_id) is not sequence:
                continue
            sequence.computed_tokens += chunk.num_tokens
            self._kv_tokens += chunk.num_tokens
            if sequence.missing_tokens == 0:
                sequence.output_tokens += 1
                drawn.append(sequence)
        return drawn

    def check_invariants(self) -> None:
        """AssertionError unless sequences and KV tokens are conserved and inside the limits."""
        listed = [*self._running, *self._waiting]
        assert len(listed) == len(self._members), "a sequence is in two queues or in none"
        assert all(self._members.get(one.request_id) is one for one in listed), (
            "an unknown sequence is queued"
        )
        assert sum(one.computed_tokens for one in listed) == self._kv_tokens, "KV tokens are not conserved"
        assert 0 <= self._kv_tokens <= self._limits.kv_capacity_tokens, "the KV cache is overfull"
        assert len(self._running) <= self._limits.max_num_seqs, "more sequences run than fit"
        assert all(one.computed_tokens == 0 for one in self._waiting), "a waiting sequence holds KV tokens"

    def _admit(self, chunks: list[Chunk], budget: int, room: int) -> None:
        while self._waiting and len(self._running) < self._limits.max_num_seqs:
            num_tokens = min(self._waiting[0].missing_tokens, budget)
            if num_tokens == 0 or num_tokens > room:
                return
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            chunks.append(_chunk(sequence, num_tokens))
            budget -= num_tokens
            room -= num_tokens

    def _preempt_last(self, chunks: list[Chunk]) -> int:
        """Send the sequence admitted last back to the queue; returns the tokens of room it frees."""
        victim = self._running.pop()
        freed = victim.computed_tokens
        self._kv_tokens -= freed
        victim.computed_tokens = 0
        self._waiting.appendleft(victim)
        for index, chunk in enumerate(chunks):
            if chunk.sequence is victim:
                freed += chunks.pop(index).num_tokens
                break
        return freed


def _chunk(sequence: Sequence, num_tokens: int) -> Chunk:
    is_decode = sequence.output_tokens > 0 and sequence.missing_tokens == 1
    return Chunk(sequence=sequence, num_tokens=num_tokens, is_decode=is_decode)
