"""Whatever is done to a replica, in any order and at any tie, counts stay right and steps do not depend on
how many are taken at once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import Phase, ReplicaLimits, Sequence
from placement.latency import LatencyModel, StepCost
from placement.types import VersionId
from tests.support.replica_logs import step_ends, token_times

# Steps of a few picoseconds, so that what is done meets the ends of steps.
COST = StepCost.of(LatencyModel(base_ms=3e-9, context_token_ms=1e-9, adapter_ms=2e-9))
SIZES = {VersionId("a"): 0, VersionId("b"): 300, VersionId("c"): 700}

operations = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cancel", "hold", "release", "look"]),
        st.sampled_from([0, 0, 1, 4, 9, 30, 400]),
        st.integers(0, 999),
        st.sampled_from([None, *SIZES]),
    ),
    max_size=50,
)
limits_drawn = st.builds(
    ReplicaLimits,
    kv_blocks=st.integers(4, 20),
    block_tokens=st.sampled_from([2, 4]),
    hash_block_tokens=st.just(4),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(5, 20),
    adapter_slots=st.integers(1, 3),
    pool_adapters=st.integers(0, 2),
    pool_bytes=st.sampled_from([0, 800]),
    load_bytes_per_s=st.sampled_from([1e14, float("inf")]),
)


class Driven:
    """One replica model and its own sequences, by number."""

    def __init__(self, limits: ReplicaLimits, max_run_steps: int) -> None:
        self.model = ReplicaModel(limits, COST, max_run_steps=max_run_steps)
        self.sequences: list[Sequence] = []

    def do(self, name: str, now_ps: int, number: int, version: VersionId | None) -> object:
        model = self.model
        if name == "submit":
            names = tuple(range(number % 3)) if number % 2 else ()
            one = Sequence(len(self.sequences), 1 + number % 5, 1 + number // 300, 8, version, names)
            self.sequences.append(one)
            model.submit(one, now_ps)
        elif name == "cancel" and self.sequences:
            victim = self.sequences[number % len(self.sequences)]
            model.advance(now_ps)
            is_here = victim.phase is not Phase.ENDED
            assert model.cancel(victim, now_ps) == is_here
        elif name == "hold" and version is not None:
            model.hold(version, 8, SIZES[version], now_ps)
        elif name == "release" and version is not None:
            return model.release(version, now_ps)
        return None

    def state(self, now_ps: int) -> object:
        self.model.advance(now_ps)
        self.model.check_invariants()
        drawn = [self.model.drawn(one) for one in self.sequences]
        return drawn, self.model.load(), self.model.wanted, self.model.evicted, self.model.gate.held

    def drain(self) -> None:
        """Hold whatever is still waited for, and run to the end."""
        model = self.model
        for version, size_bytes in SIZES.items():
            model.hold(version, 8, size_bytes, model.now_ps)
            while (next_ps := model.next_ps()) is not None:
                model.advance(next_ps + 1)


@given(limits_drawn, operations, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_any_operations_leave_one_and_the_same_outcome(
    limits: ReplicaLimits, done: list[tuple[str, int, int, VersionId | None]], max_run_steps: int
) -> None:
    whole, single = Driven(limits, 1 << 62), Driven(limits, max_run_steps)
    now_ps = 0
    for name, passed_ps, number, version in done:
        for look_ps in range(now_ps, now_ps + passed_ps, 7):
            single.state(look_ps)
        now_ps += passed_ps
        assert whole.do(name, now_ps, number, version) == single.do(name, now_ps, number, version)
        assert whole.state(now_ps) == single.state(now_ps)
    whole.drain()
    single.drain()
    assert step_ends(whole.model.log) == step_ends(single.model.log)
    assert token_times(whole.model.log) == token_times(single.model.log)
    assert all(one.phase is Phase.ENDED for one in whole.sequences)
    assert whole.model.load() == (0, 0, 0, 0.0)
