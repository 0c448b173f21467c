"""The replica model's meaning in the plainest form: one step at a time, every sequence looked at in each.

A second implementation to compare with; it shares no code with the model but its values.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from loraserve.engines.replica_model.sequence import ReplicaLimits
from placement.latency import RankKernel, StepCost, StepCounts


@dataclass(slots=True, eq=False)
class Request:
    """One request: what it wants, and when each of its tokens was drawn."""

    number: int
    at_ps: int
    prompt_tokens: int
    output_tokens: int
    rank: int = 0
    adapter: str | None = None
    names: tuple[int, ...] = ()
    token_ps: list[int] = field(default_factory=list)
    computed: int = 0
    private_blocks: int = 0
    shared: list[int] = field(default_factory=list)
    decoding: bool = False

    @property
    def known(self) -> int:
        return self.prompt_tokens + len(self.token_ps)


@dataclass(slots=True)
class Reference:
    """Runs requests to their end; every adapter is always active."""

    limits: ReplicaLimits
    cost: StepCost
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    users: dict[int, int] = field(default_factory=dict)
    unused: OrderedDict[int, None] = field(default_factory=OrderedDict)
    steps: list[tuple[int, int]] = field(default_factory=list)
    preemptions: int = 0

    def run(self, requests: list[Request]) -> None:
        coming = sorted(requests, key=lambda one: one.at_ps)
        now_ps = 0
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                now_ps = max(now_ps, coming[0].at_ps)
            while coming and coming[0].at_ps <= now_ps:
                self.waiting.append(coming.pop(0))
            chunks = self.schedule()
            begun_ps, now_ps = now_ps, now_ps + self.step_ps(chunks)
            self.steps.append((begun_ps, now_ps))
            self.finish(chunks, now_ps)

    def free(self) -> int:
        per_name = self.limits.hash_block_tokens // self.limits.block_tokens
        used = sum(one.private_blocks for one in self.running) + per_name * len(self.users)
        return self.limits.kv_blocks - used

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    def lacks(self, one: Request, tokens: int) -> int:
        per_name = self.limits.hash_block_tokens // self.limits.block_tokens
        return self.blocks(one.computed + tokens) - one.private_blocks - per_name * len(one.shared)

    def schedule(self) -> list[tuple[Request, int]]:
        chunks: list[tuple[Request, int]] = []
        budget = self.limits.max_num_batched_tokens
        preempted = False
        place = 0
        while place < len(self.running) and budget > 0:
            one = self.running[place]
            tokens = min(one.known - one.computed, budget)
            while self.lacks(one, tokens) > self.free():
                preempted = True
                self.preempt(self.running[-1])
                if one not in self.running:
                    break
            if one not in self.running:
                break
            self.take(one, tokens)
            chunks.append((one, tokens))
            budget -= tokens
            place += 1
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            if not self.admit(chunks, budget):
                break
            budget -= chunks[-1][1]
        return chunks

    def admit(self, chunks: list[tuple[Request, int]], budget: int) -> bool:
        one = self.waiting[0]
        size = self.limits.hash_block_tokens
        hits: list[int] = []
        for name in one.names[: min(one.prompt_tokens, one.known - 1) // size]:
            if name not in self.users and name not in self.unused:
                break
            hits.append(name)
        in_use = sum(name in self.users for name in hits) * size // self.limits.block_tokens
        if self.blocks(one.known) - in_use > self.free():
            return False
        for name in hits:
            self.unused.pop(name, None)
            self.users[name] = self.users.get(name, 0) + 1
        one.shared, one.computed = hits, len(hits) * size
        self.waiting.pop(0)
        self.running.append(one)
        tokens = min(one.known - one.computed, budget)
        self.take(one, tokens)
        chunks.append((one, tokens))
        return True

    def take(self, one: Request, tokens: int) -> None:
        one.private_blocks += self.lacks(one, tokens)
        while len(self.unused) * (self.limits.hash_block_tokens // self.limits.block_tokens) > self.free():
            self.unused.popitem(last=False)

    def preempt(self, one: Request) -> None:
        self.preemptions += 1
        self.leave(one)
        self.waiting.insert(0, one)

    def leave(self, one: Request) -> None:
        self.running.remove(one)
        for name in reversed(one.shared):
            self.users[name] -= 1
            if not self.users[name]:
                del self.users[name]
                self.unused[name] = None
        one.private_blocks, one.computed, one.shared, one.decoding = 0, 0, [], False

    def step_ps(self, chunks: list[tuple[Request, int]]) -> int:
        decode = [one for one, _ in chunks if one.decoding]
        prefill = [(one, tokens) for one, tokens in chunks if not one.decoding]
        adapters = {one.adapter for one, _ in chunks} - {None}
        highest = max((one.rank for one, _ in chunks if one.adapter), default=0)

        def charged(one: Request) -> int:
            if one.adapter is None:
                return 0
            kernel = self.cost.kernel
            if kernel is RankKernel.SUM:
                return one.rank
            return highest if kernel is RankKernel.PADDED_BATCH else self.cost.max_lora_rank

        return self.cost.step_ps(
            StepCounts(
                rows=len(chunks),
                prefill_tokens=sum(tokens for _, tokens in prefill),
                prefill_pairs=sum(sum(range(one.computed, one.computed + tokens)) for one, tokens in prefill),
                context_tokens=sum(one.computed + 1 for one in decode),
                adapters=len(adapters),
                decode_rank=sum(charged(one) for one in decode),
                prefill_rank=sum(charged(one) * tokens for one, tokens in prefill),
            )
        )

    def finish(self, chunks: list[tuple[Request, int]], now_ps: int) -> None:
        size = self.limits.hash_block_tokens
        decode = [one for one, _ in chunks if one.decoding]
        for one, tokens in chunks:
            one.computed += tokens
            if one.computed == one.known:
                one.token_ps.append(now_ps)
        for one in decode:
            if len(one.token_ps) == one.output_tokens:
                self.leave(one)
        for one in [one for one, _ in chunks if one not in decode]:
            for name in one.names[len(one.shared) : min(one.computed, one.prompt_tokens) // size]:
                if name in self.users or name in self.unused:
                    break
                self.users[name] = 1
                one.shared.append(name)
                one.private_blocks -= size // self.limits.block_tokens
            # A token that was drawn just now is known and not computed.
            one.decoding = bool(one.token_ps) and one.token_ps[-1] == now_ps
            if len(one.token_ps) == one.output_tokens:
                self.leave(one)
