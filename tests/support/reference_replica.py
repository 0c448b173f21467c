"""The replica model's meaning in the plainest form: one step at a time, every sequence looked at in each.

A second implementation to compare with; it shares no code with the model but its values.
"""

from dataclasses import dataclass, field

from loraserve.engines.replica_model.sequence import ReplicaLimits
from placement.latency import RankKernel, StepCost, StepCounts


@dataclass(slots=True, eq=False)
class Group:
    """The blocks of one name, and how many requests use them."""

    name: object
    blocks: list[int]
    users: int = 1


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
    groups: list[Group] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    decoding: bool = False

    @property
    def known(self) -> int:
        return self.prompt_tokens + len(self.token_ps)

    def name_at(self, place: int, size: int) -> object:
        """What the trace calls a block, and for what it does not know a name that nobody else has."""
        if place < len(self.names) and (place + 1) * size <= self.prompt_tokens:
            return self.adapter, self.names[place]
        return f"{self.number}/{place}"


class Reference:
    """Runs requests to their end; every adapter is always active."""

    def __init__(self, limits: ReplicaLimits, cost: StepCost) -> None:
        self.limits = limits
        self.cost = cost
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free = list(range(limits.kv_blocks))
        self.by_name: dict[object, list[Group]] = {}
        self.group_of: dict[int, Group] = {}
        self.has_names = False
        self.steps: list[tuple[int, int]] = []
        self.preemptions = 0

    def run(self, requests: list[Request]) -> None:
        coming = sorted(requests, key=lambda one: one.at_ps)
        now_ps = 0
        while coming or self.waiting or self.running:
            if not self.waiting and not self.running:
                now_ps = max(now_ps, coming[0].at_ps)
            while coming and coming[0].at_ps <= now_ps:
                self.has_names |= bool(coming[0].names)
                self.waiting.append(coming.pop(0))
            chunks = self.schedule()
            begun_ps, now_ps = now_ps, now_ps + self.step_ps(chunks)
            self.steps.append((begun_ps, now_ps))
            self.finish(chunks, now_ps)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    def lacks(self, one: Request, tokens: int) -> int:
        held = len(one.tail) + sum(len(group.blocks) for group in one.groups)
        return self.blocks(one.computed + tokens) - held

    def schedule(self) -> list[tuple[Request, int]]:
        chunks: list[tuple[Request, int]] = []
        budget = self.limits.max_num_batched_tokens
        preempted = False
        place = 0
        while place < len(self.running) and budget > 0:
            one = self.running[place]
            tokens = min(one.known - one.computed, budget)
            while self.lacks(one, tokens) > len(self.free):
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
        hits: list[Group] = []
        for place in range((one.known - 1) // size):
            found = self.by_name.get(one.name_at(place, size))
            if not found:
                break
            hits.append(found[0])
        in_use = sum(len(group.blocks) for group in hits if group.users)
        if self.blocks(one.known) - in_use > len(self.free):
            return False
        for group in hits:
            if not group.users:
                self.free = [block for block in self.free if block not in group.blocks]
            group.users += 1
        one.groups, one.computed = hits, len(hits) * size
        self.waiting.pop(0)
        self.running.append(one)
        tokens = min(one.known - one.computed, budget)
        self.take(one, tokens)
        chunks.append((one, tokens))
        return True

    def take(self, one: Request, tokens: int) -> None:
        for _ in range(self.lacks(one, tokens)):
            block = self.free.pop(0)
            group = self.group_of.get(block)
            if group is not None:
                self.by_name[group.name].remove(group)
                for other in group.blocks:
                    del self.group_of[other]
            one.tail.append(block)
        if not one.decoding:
            self.give_names(one, one.computed + tokens)

    def give_names(self, one: Request, tokens: int) -> None:
        size = self.limits.hash_block_tokens
        for place in range(len(one.groups), tokens // size if self.has_names else 0):
            count = size // self.limits.block_tokens
            group = Group(one.name_at(place, size), one.tail[:count])
            one.tail = one.tail[count:]
            one.groups.append(group)
            self.by_name.setdefault(group.name, []).append(group)
            self.group_of |= dict.fromkeys(group.blocks, group)

    def preempt(self, one: Request) -> None:
        self.preemptions += 1
        self.leave(one)
        self.waiting.insert(0, one)

    def leave(self, one: Request) -> None:
        self.running.remove(one)
        self.give_names(one, one.computed)
        self.free = one.tail + self.free
        for group in reversed(one.groups):
            group.users -= 1
            if not group.users:
                self.free += group.blocks
        one.tail, one.groups, one.computed, one.decoding = [], [], 0, False

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
        decode = [one for one, _ in chunks if one.decoding]
        for one, tokens in chunks:
            one.computed += tokens
            if one.computed == one.known:
                one.token_ps.append(now_ps)
                one.decoding = True
        for one in [*decode, *(one for one, _ in chunks if one not in decode)]:
            if len(one.token_ps) == one.output_tokens:
                self.leave(one)
