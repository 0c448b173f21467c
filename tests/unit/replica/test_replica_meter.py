"""The meter: rates as a router needs them, known early, robust against a queue's waves and slow readers."""

from random import Random

import pytest

from loraserve.clock import ManualClock
from loraserve.replica.meter import MIN_SAMPLE_S, Meter, Progress, Rates

TOKEN_S = 0.05
OUTPUT_TOKENS = 40


class Engine:
    """`slots` requests at a time, each `OUTPUT_TOKENS` steps of `TOKEN_S`; a report every two steps."""

    def __init__(self, slots: int) -> None:
        self.clock = ManualClock()
        self.meter = Meter(self.clock)
        self.running: list[tuple[Progress, list[int]]] = []
        self.slots = slots
        self.seen: list[Rates] = []

    def work(self, steps: int, *, waiting: int, together: bool = False) -> Rates:
        """Always as many running as fit; `together` begins and ends them all at once."""
        for number in range(steps):
            while len(self.running) < self.slots:
                had = 0 if together else len(self.running) * OUTPUT_TOKENS // self.slots
                self.running.append((self.meter.begin(), [had if not self.seen else 0]))
            self.clock.advance(TOKEN_S)
            for progress, tokens in self.running:
                progress.step(1)
                tokens[0] += 1
                if tokens[0] == OUTPUT_TOKENS:
                    progress.finish(OUTPUT_TOKENS)
            self.running = [one for one in self.running if one[1][0] < OUTPUT_TOKENS]
            if number % 2:
                self.seen.append(self.meter.rates(running=self.slots, waiting=waiting))
        return self.seen[-1]


def test_nothing_is_known_of_an_engine_that_has_done_nothing() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    clock.advance(1.0)
    assert meter.rates(running=0, waiting=0) == Rates(0.0, 0.0, 0.0)


@pytest.mark.parametrize("together", [False, True])
def test_the_rates_are_those_of_the_engine(together: bool) -> None:
    rates = Engine(8).work(1000, waiting=5, together=together)
    assert rates.starts_per_s == pytest.approx(8 / (OUTPUT_TOKENS * TOKEN_S), rel=0.3)
    assert rates.token_s == pytest.approx(TOKEN_S)
    assert rates.output_tokens == pytest.approx(OUTPUT_TOKENS)


def test_the_rate_of_starts_is_guessed_as_soon_as_somebody_waits() -> None:
    engine = Engine(8)
    engine.work(200, waiting=0)
    engine.work(2, waiting=50)
    assert engine.seen[-1].starts_per_s == pytest.approx(4.0, rel=0.3)


def test_starts_count_only_while_somebody_waits() -> None:
    engine = Engine(8)
    engine.work(400, waiting=3)
    counted = engine.seen[-1].starts_per_s
    for _ in range(100):
        engine.clock.advance(0.1)
        engine.meter.rates(running=8, waiting=0)
    assert engine.meter.rates(running=8, waiting=0).starts_per_s == pytest.approx(counted, rel=0.3)


def test_an_engine_that_stops_starting_requests_is_seen_to() -> None:
    engine = Engine(8)
    before = engine.work(400, waiting=3).starts_per_s
    for _ in range(100):
        engine.clock.advance(0.1)
        engine.meter.rates(running=8, waiting=3)
    assert 0 < engine.meter.rates(running=8, waiting=3).starts_per_s < before / 4


def test_one_reader_that_stops_does_not_make_the_engine_slow() -> None:
    engine = Engine(8)
    stalled = engine.meter.begin()
    stalled.step(1)
    before = engine.work(600, waiting=0).token_s
    stalled.step(1)
    assert engine.work(2, waiting=0).token_s == pytest.approx(before, rel=0.05)


def test_a_slower_engine_is_believed_within_seconds() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    progress = meter.begin()
    for token_s, steps in ((0.01, 200), (0.5, 60)):
        for _ in range(steps):
            clock.advance(token_s)
            progress.step(1)
            meter.rates(running=1, waiting=0)
    assert meter.rates(running=1, waiting=0).token_s == pytest.approx(0.5, rel=0.2)


def test_several_routers_may_ask() -> None:
    engine = Engine(4)
    engine.work(100, waiting=2)
    engine.clock.advance(MIN_SAMPLE_S / 2)
    assert engine.meter.rates(running=4, waiting=2) == engine.seen[-1]


def test_a_step_without_tokens_is_no_start() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    progress = meter.begin()
    progress.step(0)
    clock.advance(0.1)
    progress.step(1)
    clock.advance(0.2)
    progress.step(0)
    clock.advance(0.2)
    progress.step(2)
    assert meter.rates(running=1, waiting=0).token_s == pytest.approx(0.2)


def test_outputs_are_averaged_over_the_last_ones() -> None:
    meter = Meter(clock := ManualClock())
    rng = Random(0)
    for mean in (10, 100):
        for _ in range(500):
            meter.begin().finish(rng.randint(mean - 5, mean + 5))
        clock.advance(1.0)
        assert meter.rates(running=0, waiting=0).output_tokens == pytest.approx(mean, abs=2)
