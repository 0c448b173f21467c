"""Continuous batching as vLLM V1 schedules it, planned a run of steps at a time.

Owns who waits, who runs and which KV blocks they hold. Knows no time but durations: a run is planned, and
so many of its steps are committed as really happen. Between two commits every decoding sequence draws one
token per step, so that nothing is done per token.

Each step: running sequences first, one token for each that decodes and a chunk of a prompt that was begun;
then waiting ones in their order, while the token budget, the number of sequences and the KV blocks allow
(the whole prompt must fit, as vLLM's `scheduler_reserve_full_isl` has it). When a running sequence finds no
block, the one that was admitted last gives its blocks back and goes to the head of the queue.
"""

import heapq
from collections import deque

from loraserve.engines.replica_model.cost import BatchRanks, RankMembers, StepPricer
from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.engines.replica_model.prefix import PrefixCache
from loraserve.engines.replica_model.run import Run
from loraserve.engines.replica_model.sequence import Phase, ReplicaLimits, Sequence
from placement.latency import StepCost
from placement.routing.chooser import RankLoad


class Batch:
    """Waiting and running sequences of one replica; `plan`, then `commit` what has happened of it."""

    def __init__(self, limits: ReplicaLimits, cost: StepCost, log: ReplicaLog, max_run_steps: int) -> None:
        self._limits = limits
        self._log = log
        self._max_run_steps = max_run_steps
        self._block_tokens = limits.block_tokens
        self._pricer = StepPricer(cost)
        self._growth_per_row_ps = cost.context_token
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        """In the order of admission."""
        self.ended: list[Sequence] = []
        self.num_steps = log.num_steps
        self.outstanding_tokens = 0
        self.used_blocks = 0
        self.preemptions = 0
        self._partial: Sequence | None = None
        """The one whose prompt was begun and is not done; always the last of `running`."""
        self._prefix: PrefixCache | None = None
        # The decoding rows: how many, their tokens in the KV cache when the next step is done, and how many
        # need a new block in a step of each number modulo the tokens of a block.
        self.num_decoding = 0
        self._context_tokens = 0
        self._block_phases = [0] * limits.block_tokens
        self._ranks = BatchRanks()
        self._members: RankMembers | None = None
        """Only once somebody has asked for it."""
        self._finish: list[tuple[int, int, Sequence]] = []
        self._order = 0

    # -- members -------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        if sequence.hash_ids and self._prefix is None:
            self._prefix = PrefixCache(self._limits, self._limits.kv_blocks - self.used_blocks)
        self.outstanding_tokens += sequence.output_tokens - sequence.drawn
        self.waiting.append(sequence)
        if self._members is not None:
            self._members.join(sequence)

    def remove(self, sequence: Sequence, run: Run | None) -> bool:
        """Take a sequence out with all it holds, also in the middle of a step of `run`; False if absent.

        The tokens of that step count for nothing, its duration stays.
        """
        if sequence in self.running:
            planned = 0
            if run is not None:
                planned = self._planned_blocks(sequence, run)
                run.chunks = [chunk for chunk in run.chunks if chunk[0] is not sequence]
            self._leave(sequence, planned)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            if self._members is not None:
                self._members.leave(sequence)
        else:
            return False
        self.outstanding_tokens -= sequence.output_tokens - sequence.drawn
        sequence.phase = Phase.ENDED
        return True

    def close(self) -> None:
        """Nothing is left in it, and nothing will come: what is in the cache is gone too."""
        self._prefix = None

    def rank_loads(self) -> tuple[RankLoad, ...]:
        """What runs or waits by rank, the lowest first."""
        if self._members is None:
            self._members = RankMembers([*self.running, *self.waiting])
        return self._members.loads()

    def drawn(self, sequence: Sequence) -> int:
        """The tokens that the sequence has drawn by the last commit."""
        if sequence.phase is Phase.DECODE:
            return sequence.drawn + self.num_steps - 1 - sequence.first_step
        return sequence.drawn

    # -- steps ---------------------------------------------------------------------------------

    def plan(self, run: Run) -> bool:
        """Fill in the next run; False if there is nothing to compute."""
        chunks: list[tuple[Sequence, int]] = []
        need = self._block_phases[self.num_steps % self._block_tokens]
        budget = self._limits.max_num_batched_tokens - self.num_decoding
        gave_way = False
        run.taken = 0
        if self._partial is None and need <= self._limits.kv_blocks - self.used_blocks:
            # Before anybody is admitted, who then cannot share what they take.
            self.take_step_blocks(run)
            if self.waiting:
                self._admit(chunks, budget, need)
        elif not self._continue(run, chunks, need):
            gave_way = True
        elif self.waiting:
            self._admit(chunks, budget - sum(tokens for _, tokens in chunks), need)
        rows = self.num_decoding
        run.chunks = chunks
        if chunks:
            run.steps, run.growth_ps = 1, 0
            run.step_ps = self._pricer.mixed_ps(rows, self._context_tokens, self._ranks, chunks)
            run.prefill_tokens, run.max_rank = self._pricer.prefill_tokens, self._pricer.max_rank
            return True
        if not rows:
            return False
        # Who gave way may come back in the very next step.
        run.steps = 1 if gave_way else self._steps_to_go(rows)
        run.growth_ps = self._growth_per_row_ps * rows
        run.step_ps = self._pricer.decode_ps(rows, self._context_tokens, self._ranks)
        run.prefill_tokens, run.max_rank = 0, self._pricer.max_rank
        return True

    def commit(self, run: Run, steps: int, begun_ps: int, ended_ps: int) -> None:
        """Account the first so many steps of the run as done; who has drawn everything is in `ended`."""
        rows, first_step = self.num_decoding, self.num_steps
        self.num_steps = first_step + steps
        blocks = 0
        if rows:
            self._context_tokens += rows * steps
            blocks = self.blocks_to_come(first_step, steps)
            self.used_blocks += blocks
            self.outstanding_tokens -= rows * steps
        if self._prefix is not None:
            self._prefix.allocate(blocks - run.taken)
            run.taken = 0
        log = self._log
        log.run_step.append(first_step)
        log.run_ps.append(begun_ps)
        log.run_step_ps.append(run.step_ps)
        log.run_growth_ps.append(run.growth_ps)
        log.run_rows.append(rows)
        log.run_prefill_tokens.append(run.prefill_tokens)
        log.run_max_rank.append(run.max_rank)
        log.num_steps = self.num_steps
        finish = self._finish
        while finish and finish[0][0] < self.num_steps:
            _, _, sequence = heapq.heappop(finish)
            # One that was preempted or cancelled has left its old entry here.
            if sequence.phase is Phase.DECODE and sequence.finish_step < self.num_steps:
                self._end(sequence, ended_ps)
        if run.chunks:
            self._partial = None
            for sequence, tokens in run.chunks:
                sequence.computed += tokens
                if sequence.computed == sequence.known:
                    self._first_token(sequence, ended_ps)
                else:
                    self._partial = sequence
        log.run_blocks.append(self.used_blocks)

    def take_step_blocks(self, run: Run) -> None:
        """Have the prefix cache give up what the decoding rows take in the next step of the run."""
        if self._prefix is not None:
            run.taken = self._block_phases[self.num_steps % self._block_tokens]
            self._prefix.allocate(run.taken)

    def blocks_to_come(self, first_step: int, steps: int) -> int:
        """The KV blocks that decoding rows take in so many steps from `first_step` on."""
        size, phases = self._block_tokens, self._block_phases
        whole, rest = divmod(steps, size)
        begin = first_step % size
        end = begin + rest
        if end <= size:
            return whole * self.num_decoding + sum(phases[begin:end])
        return whole * self.num_decoding + sum(phases[begin:]) + sum(phases[: end - size])

    def may_end(self, run: Run) -> bool:
        """Whether any sequence could draw its last token in the steps of the run, which was planned last."""
        finish = self._finish
        return (
            not run.chunks
            or (bool(finish) and finish[0][0] <= self.num_steps)
            or any(sequence.output_tokens - sequence.drawn <= 1 for sequence, _ in run.chunks)
        )

    def check_invariants(self, run: Run | None) -> None:
        """AssertionError unless sequences, tokens and blocks add up; `run` is planned and not committed."""
        decoding = [one for one in self.running if one.phase is Phase.DECODE]
        assert len(decoding) == self.num_decoding, "a decoding row is lost"
        begun = {one for one in self.running if one.phase is not Phase.DECODE}
        begun -= {one for one, _ in run.chunks} if run is not None else set()
        assert begun <= {self._partial}, "a prompt that was begun is lost"
        assert len(self.running) <= self._limits.max_num_seqs, "more sequences run than fit"
        context = sum(one.known + self.num_steps - one.first_step for one in decoding)
        assert context == self._context_tokens, "context tokens are not conserved"
        private = sum(self._private_blocks(one) for one in self.running)
        private += sum(self._planned_blocks(one, run) for one in self.running) if run is not None else 0
        shared = 0 if self._prefix is None else self._prefix.used_blocks
        assert private + shared == self.used_blocks, "KV blocks are not conserved"
        assert 0 <= self.used_blocks <= self._limits.kv_blocks, "the KV cache is overfull"
        if self._prefix is not None:
            taken = 0 if run is None else run.taken
            free = self._prefix.free_blocks + taken
            assert free + self.used_blocks == self._limits.kv_blocks, "free KV blocks are not conserved"
        assert sum(self._block_phases) == self.num_decoding, "a block phase is lost"
        members = [*self.running, *self.waiting]
        assert self.outstanding_tokens == sum(one.output_tokens - self.drawn(one) for one in members)
        assert all(one.computed == 0 and not one.cached for one in self.waiting), "who waits holds blocks"
        counted = RankMembers(members).loads()
        assert self.rank_loads() == counted, "sequences of a rank are lost"

    # -- planning ------------------------------------------------------------------------------

    def _steps_to_go(self, rows: int) -> int:
        """Steps until somebody ends or the blocks run out; at least one."""
        finish, step = self._finish, self.num_steps
        while finish[0][2].phase is not Phase.DECODE or finish[0][2].finish_step != finish[0][0]:
            heapq.heappop(finish)
        steps = min(finish[0][0] - step + 1, self._max_run_steps)
        free = self._limits.kv_blocks - self.used_blocks
        if free < rows * (steps // self._block_tokens + 1) and self.blocks_to_come(step, steps) > free:
            low, high = 1, steps
            while high - low > 1:
                middle = (low + high) // 2
                if self.blocks_to_come(step, middle) <= free:
                    low = middle
                else:
                    high = middle
            return low
        return steps

    def _admit(self, chunks: list[tuple[Sequence, int]], budget: int, need: int) -> None:
        """Take waiting sequences in; `need` blocks are spoken for by decoding rows."""
        waiting, running, size = self.waiting, self.running, self._block_tokens
        most = self._limits.max_num_seqs
        free = self._limits.kv_blocks - self.used_blocks - need
        while waiting and budget > 0 and len(running) < most:
            sequence = waiting[0]
            known = sequence.known
            if self._prefix is not None:
                free = self._take_prefix(self._prefix, sequence, free)
            if not sequence.computed and -(-known // size) > free:
                return
            tokens = min(known - sequence.computed, budget)
            blocks = -(-(sequence.computed + tokens) // size) - (sequence.computed // size)
            free -= blocks
            self.used_blocks += blocks
            if self._prefix is not None:
                self._prefix.allocate(blocks)
                self._prefix.register(sequence, sequence.computed + tokens)
            waiting.popleft()
            running[sequence] = None
            sequence.phase = Phase.PREFILL
            chunks.append((sequence, tokens))
            budget -= tokens

    def _take_prefix(self, prefix: PrefixCache, sequence: Sequence, free: int) -> int:
        """Begin the sequence with what the cache has of it, if all of it fits; the blocks free then."""
        matched, in_use = prefix.match(sequence)
        if matched and -(-sequence.known // self._block_tokens) - in_use <= free:
            sequence.computed, fresh = prefix.take(sequence, matched)
            self.used_blocks += fresh
            return free - fresh
        return free

    def _continue(self, run: Run, chunks: list[tuple[Sequence, int]], need: int) -> bool:
        """Plan the running sequences where one has a prompt to go on with or blocks are short; False if
        somebody had to give way, after whom nobody is admitted in the same step."""
        partial = self._partial
        fits = partial is not None and need + self._next_chunk(partial)[1] <= (
            self._limits.kv_blocks - self.used_blocks
        )
        if not fits:
            self._make_room()
        self.take_step_blocks(run)
        partial = self._partial
        if partial is not None:
            tokens, blocks = self._next_chunk(partial)
            self.used_blocks += blocks
            if self._prefix is not None:
                self._prefix.allocate(blocks)
                self._prefix.register(partial, partial.computed + tokens)
            chunks.append((partial, tokens))
        return fits

    def _next_chunk(self, partial: Sequence) -> tuple[int, int]:
        """The tokens of its prompt that it computes next, and the blocks they take."""
        budget = self._limits.max_num_batched_tokens - self.num_decoding
        tokens, size = min(partial.known - partial.computed, budget), self._block_tokens
        return tokens, -(-(partial.computed + tokens) // size) + -partial.computed // size

    def _make_room(self) -> None:
        """Give each running sequence its block in turn; who came last gives way where none is left."""
        phase = self.num_steps % self._block_tokens
        taken = 0
        for sequence in tuple(self.running):
            if sequence not in self.running:
                return
            if sequence is self._partial:
                need = self._next_chunk(sequence)[1]
            else:
                need = (sequence.first_step + 1 - sequence.known - phase) % self._block_tokens == 0
            while taken + need > self._limits.kv_blocks - self.used_blocks:
                victim = next(reversed(self.running))
                self._preempt(victim)
                if victim is sequence:
                    return
            taken += need

    # -- changes -------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.preemptions += 1
        sequence.phase = Phase.QUEUED
        sequence.known = sequence.prompt_tokens + sequence.drawn
        self.waiting.appendleft(sequence)
        if self._members is not None:
            self._members.join(sequence)

    def _first_token(self, sequence: Sequence, now_ps: int) -> None:
        """The prompt is computed: a token is drawn, and the next ones in the steps to come."""
        step = self.num_steps - 1
        if sequence.first_ps < 0:
            sequence.first_ps = now_ps
        sequence.drawn += 1
        self.outstanding_tokens -= 1
        sequence.first_step = step
        sequence.finish_step = step + sequence.output_tokens - sequence.drawn
        sequence.phase = Phase.DECODE
        known = sequence.known
        self.num_decoding += 1
        self._context_tokens += known + 1
        self._block_phases[(step + 1 - known) % self._block_tokens] += 1
        self._ranks.add(sequence)
        if self._members is not None:
            self._members.draw(sequence)
        if sequence.finish_step <= step:
            self._end(sequence, now_ps)
            return
        self._order += 1
        finish = self._finish
        heapq.heappush(finish, (sequence.finish_step, self._order, sequence))
        if len(finish) > 2 * self.num_decoding + 64:
            # Those who left before their end are held no longer.
            finish[:] = [
                one for one in finish if one[2].phase is Phase.DECODE and one[2].finish_step == one[0]
            ]
            heapq.heapify(finish)

    def _end(self, sequence: Sequence, now_ps: int) -> None:
        self._leave(sequence)
        sequence.last_ps = now_ps
        sequence.phase = Phase.ENDED
        self.ended.append(sequence)

    def _leave(self, sequence: Sequence, planned_blocks: int = 0) -> None:
        """Out of the batch: give back the blocks, those planned included, and note the stretch of output."""
        del self.running[sequence]
        if self._members is not None:
            self._members.leave(sequence)
        if sequence is self._partial:
            self._partial = None
        if self._prefix is not None:
            # What it drew has names too: one that gives way may find its own blocks again.
            self._prefix.register(sequence, self._tokens_held(sequence))
        private = self._private_blocks(sequence) + planned_blocks
        if sequence.phase is Phase.DECODE:
            first, last = sequence.first_step, self.num_steps - 1
            self.num_decoding -= 1
            self._context_tokens -= sequence.known + 1 + last - first
            self._block_phases[(first + 1 - sequence.known) % self._block_tokens] -= 1
            self._ranks.discard(sequence)
            sequence.drawn += last - first
            log = self._log
            log.stretch_request.append(sequence.request)
            log.stretch_first.append(first)
            log.stretch_last.append(last)
        self.used_blocks -= private
        if self._prefix is not None:
            self.used_blocks -= self._prefix.release(sequence, private)
        sequence.computed = 0

    def _planned_blocks(self, sequence: Sequence, run: Run) -> int:
        """The blocks that the sequence's chunk in a run takes that is not committed yet."""
        tokens = sum(tokens for one, tokens in run.chunks if one is sequence)
        return (
            -(-(sequence.computed + tokens) // self._block_tokens) + -sequence.computed // self._block_tokens
        )

    def _private_blocks(self, sequence: Sequence) -> int:
        """The blocks that only the sequence knows, without those of a chunk that is not committed."""
        blocks = -(-self._tokens_held(sequence) // self._block_tokens)
        return blocks - len(sequence.cached) * (self._limits.hash_block_tokens // self._block_tokens)

    def _tokens_held(self, sequence: Sequence) -> int:
        if sequence.phase is Phase.DECODE:
            return sequence.known + self.num_steps - 1 - sequence.first_step
        return sequence.computed
