"""Demand in the live controller: counted by replicas, measured over epochs, forecast, and kept."""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock, WallClock
from loraserve.config import Config, PlacementSection
from loraserve.controller.controller import Controller
from loraserve.controller.demand import DemandBook, TokenMeter
from loraserve.controller.demand_memory import Life
from loraserve.controller.store import Store
from loraserve.engines.base import Engine
from loraserve.engines.description import ReplicaReport
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import WorkFailedError
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.samples import SampleSet
from placement.cluster.invariants import check_cluster
from placement.demand import DEFAULT_FORECASTER, FORECASTERS, ForecastOptions, forecaster
from placement.types import AdapterName, AdapterVersion, ReplicaId, VersionId
from tests.support.controller_kit import Setup, small_config

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")
A, B = VersionId("a@1"), VersionId("b@1")
QUIET = ReplicaReport(running=0, waiting=0, kv_cache_usage=0.0, resident=(), resident_bytes=0)
REGISTERED = AdapterVersion(version_id=A, name=AdapterName("a"), sha256="1", rank=8, size_bytes=1)
SECTION = PlacementSection(epoch_s=10.0, window_s=10.0, history_s=50.0, forecast="trend")


def said(sequence: int, incarnation: str = "x", **tokens: int) -> ReplicaReport:
    counts = {VersionId(f"{name}@1"): total for name, total in tokens.items()}
    return replace(QUIET, incarnation=incarnation, sequence=sequence, tokens=counts)


# -- counts ------------------------------------------------------------------------------------


class Counting:
    """A replica's lives that count, a way that loses, repeats and reorders reports, and controllers that die.

    Each life has a version of its own, `served` says what was asked of it, `taken` what came out in the end.
    """

    def __init__(self) -> None:
        self.meter = TokenMeter()
        self.saved: tuple[Life, ...] = ()
        self.served: Counter[VersionId] = Counter()
        self.taken: Counter[VersionId] = Counter()
        self.on_way: list[ReplicaReport] = []
        self.sequence = self.num_lives = 0
        self.begin()

    @property
    def life(self) -> str:
        return f"life{self.num_lives}"

    @property
    def version(self) -> VersionId:
        return VersionId(f"{self.life}@1")

    def begin(self) -> None:
        self.num_lives, self.sequence = self.num_lives + 1, 0
        self.meet()

    def meet(self) -> None:
        self.meter.met(R0, self.life, {self.version: self.served[self.version]})

    def serve(self, tokens: int) -> None:
        self.served[self.version] += tokens

    def report(self) -> None:
        self.sequence += 1
        self.on_way.append(said(self.sequence, self.life, **{self.life: self.served[self.version]}))

    def hear(self, index: int, *, twice: bool) -> None:
        if self.on_way:
            report = self.on_way.pop(index % len(self.on_way))
            for _ in range(1 + twice):
                self.meter.heard(R0, report)

    def end_epoch(self) -> None:
        self.taken.update(self.meter.take())
        self.saved = self.meter.lives

    def restart_controller(self) -> None:
        """What is on its way to the one before comes to nobody."""
        self.on_way.clear()
        self.meter = TokenMeter(self.saved)
        self.meet()


STEPS = st.sampled_from(["report", "report", "hear", "hear", "begin", "end_epoch", "restart_controller"])


@given(st.lists(st.tuples(STEPS, st.integers(0, 9), st.booleans()), max_size=40))
def test_nothing_is_lost_or_counted_twice(steps: list[tuple[str, int, bool]]) -> None:
    one = Counting()
    one.end_epoch()
    for step, number, is_odd in steps:
        one.serve(number)
        match step:
            case "hear":
                one.hear(number, twice=is_odd)
            case "report":
                one.report()
                if is_odd:
                    one.on_way.pop()  # lost
            case _:
                getattr(one, step)()
    one.report()
    one.hear(len(one.on_way) - 1, twice=True)
    one.end_epoch()
    whole = {one.version: one.served[one.version]} if one.served[one.version] else {}
    assert {version: count for version, count in one.taken.items() if version == one.version} == whole
    assert all(count <= one.served[version] for version, count in one.taken.items())
    assert one.meter.take() == {}


def test_a_report_that_comes_after_a_newer_one_changes_nothing() -> None:
    meter = TokenMeter()
    meter.met(R0, "x", {})
    meter.heard(R0, said(1, a=5))
    meter.heard(R0, said(3, a=9, b=2))
    meter.heard(R0, said(2, a=7))
    meter.heard(R0, said(4, a=9, b=3))
    assert meter.take() == {A: 9, B: 3}


def test_a_new_life_counts_from_nothing_and_one_that_is_found_from_where_it_is() -> None:
    meter = TokenMeter()
    meter.met(R0, "x", {A: 1000})
    meter.met(R1, "y", {})
    meter.heard(R0, said(41, a=1010))
    meter.heard(R1, said(2, "y", a=3))  # The first one was lost.
    meter.met(R0, "z", {})
    meter.heard(R0, said(1, "z", a=2))
    meter.heard(R0, said(42, a=1011))  # It has been long on its way.
    meter.heard(R0, said(2, "z", a=4))
    assert meter.take() == {A: 18}


def test_a_life_that_nobody_has_met_counts_from_its_first_report() -> None:
    meter = TokenMeter()
    meter.heard(R0, said(40, a=1000))
    meter.heard(R0, said(41, a=1010))
    assert meter.take() == {A: 10}


def test_a_version_that_a_replica_forgot_counts_anew_when_it_comes_back() -> None:
    meter = TokenMeter()
    meter.met(R0, "x", {})
    for report in (said(1, a=100), said(2, b=1), said(3, a=4, b=1), said(5, a=3, b=1)):
        meter.heard(R0, report)
    assert meter.take() == {A: 107, B: 1}


# -- epochs ------------------------------------------------------------------------------------


def make_book(path: Path, section: PlacementSection = SECTION) -> tuple[DemandBook, Store, ManualClock]:
    store, clock = Store(path / "controller.sqlite"), ManualClock()
    return DemandBook(section, store, clock, [REGISTERED]), store, clock


def tell(
    book: DemandBook, clock: ManualClock, totals: list[int], *, first: int = 1, every_s: float = 10
) -> None:
    """One report and one epoch for each of these counts of adapter a."""
    if first == 1:
        book.met(R0, "x", {})
    for sequence, total in enumerate(totals, first):
        book.heard(R0, said(sequence, a=total))
        clock.advance(every_s)
        book.end_epoch([REGISTERED])


def test_a_window_is_of_whole_epochs_and_their_real_length(tmp_path: Path) -> None:
    book, store, clock = make_book(tmp_path, PlacementSection(epoch_s=10.0, window_s=20.0))
    tell(book, clock, [100])
    assert book.measured == {A: 10.0}
    tell(book, clock, [400], first=2, every_s=20)
    assert book.measured == {A: pytest.approx(400 / 30)}
    tell(book, clock, [400], first=3)
    assert book.measured == {A: pytest.approx(300 / 30)}
    tell(book, clock, [400], first=4)
    assert book.measured == {}
    store.close()


def test_a_book_that_comes_back_goes_on_as_if_it_had_not_been_away(tmp_path: Path) -> None:
    totals = [100, 300, 600, 1000, 1500, 2100, 2200]
    book, store, clock = make_book(tmp_path)
    tell(book, clock, totals[:4])
    kept = (book.measured, book.forecast, book.history)
    store.close()
    again, store, clock = make_book(tmp_path)
    assert (again.measured, again.forecast, again.history) == kept
    again.met(R0, "x", {A: 1000})  # what was served before
    tell(again, clock, totals[4:], first=6)
    store.close()
    whole = forecaster("trend", ForecastOptions(epoch_s=10, window_s=10, history_s=50))
    for rate in (10, 20, 30, 40, 50, 60, 10):
        whole.observe({A: float(rate)})
    assert again._forecaster.export() == whole.export()
    assert [dict(window) for window in again.history] == [{A: float(rate)} for rate in (30, 40, 50, 60, 10)]


def test_a_book_that_comes_back_within_a_window_counts_what_came_meanwhile(tmp_path: Path) -> None:
    book, store, clock = make_book(tmp_path)
    tell(book, clock, [100, 300])
    book.heard(R0, said(3, a=350))  # Of an epoch that does not end.
    clock.advance(4)
    again = DemandBook(SECTION, store, clock, [REGISTERED])
    again.met(R0, "x", {A: 390})
    again.heard(R0, said(5, a=400))
    clock.advance(6)
    again.end_epoch([REGISTERED])
    assert again.measured == {A: 10.0}
    clock.advance(SECTION.window_s + 1)
    late = DemandBook(SECTION, store, clock, [REGISTERED])
    late.met(R0, "x", {A: 900})
    late.heard(R0, said(9, a=950))
    clock.advance(10)
    late.end_epoch([REGISTERED])
    assert late.measured == {A: 5.0}
    store.close()


def test_another_forecaster_begins_from_the_windows_that_were_kept(tmp_path: Path) -> None:
    book, store, clock = make_book(tmp_path)
    tell(book, clock, [100, 300, 600])
    store.close()
    other, store, _ = make_book(tmp_path, PlacementSection(epoch_s=10, window_s=10, forecast="loraserve"))
    assert other.forecast == {A: pytest.approx(40.0)}
    store.close()


@pytest.mark.parametrize(
    "kept",
    [
        {"state": "{"},
        {"state": "[]"},
        {"state": '{"forecaster": 3, "parts": []}'},
        {"state": '{"forecaster": {}, "parts": [[1]]}'},
        {"window/0": "{}"},
        {"state": '{"forecaster": {}, "parts": []}', "window/x": "{}"},
        {"state": '{"forecaster": {}, "parts": []}', "window/0": "[1]"},
    ],
)
def test_what_cannot_be_read_is_measured_anew(
    tmp_path: Path, kept: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    book, store, _ = make_book(tmp_path)
    store.save_demand(kept)
    store.close()
    with caplog.at_level(logging.WARNING):
        book, store, clock = make_book(tmp_path)
    assert "cannot be read, it is measured anew" in caplog.text
    tell(book, clock, [100])
    assert book.measured == {A: 10.0}
    assert sorted(store.demand()) == ["state", "window/0"]
    store.close()


def test_the_store_keeps_as_many_windows_as_the_history_has(tmp_path: Path) -> None:
    book, store, clock = make_book(tmp_path)
    tell(book, clock, [100 * number for number in range(12)])
    assert sorted(store.demand()) == ["state", "window/10", "window/11", "window/7", "window/8", "window/9"]
    store.close()
    again, store, clock = make_book(tmp_path)
    tell(again, clock, [100], first=13)
    assert sorted(store.demand())[1:4] == ["window/10", "window/11", "window/12"]
    assert len(store.demand()) == 6
    store.close()


class FullStore(Store):
    """A store that takes no demand while it is full."""

    is_full = False

    def save_demand(self, changes: Mapping[str, str | None]) -> None:
        """Refuse, or save."""
        if self.is_full:
            raise WorkFailedError("the disk is full")
        super().save_demand(changes)


def test_a_full_disk_costs_no_epoch_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, clock = FullStore(tmp_path / "controller.sqlite"), ManualClock()
    book = DemandBook(SECTION, store, clock, [REGISTERED])
    store.is_full = True
    tell(book, clock, [100, 200, 300])
    assert book.measured == {A: 10.0}
    assert caplog.text.count("demand is not saved: the disk is full") == 1
    store.is_full = False
    tell(book, clock, [400], first=4)
    assert DemandBook(SECTION, store, clock, [REGISTERED]).history == book.history
    store.close()


# -- the controller ----------------------------------------------------------------------------


@pytest.fixture
async def live(tmp_path: Path, samples: SampleSet) -> AsyncIterator[Setup]:
    """A cluster of two replicas whose epochs the test ends."""
    config = small_config(
        samples.model, placement={"epoch_s": 1e6, "window_s": 1e6, "history_s": 5e6, "forecast": "loraserve"}
    )

    def engine(replica: ReplicaId, config: Config) -> Engine:
        return EmulatedEngine(config.engine, config.emulated, config.model, clock=WallClock())

    one = Setup(tmp_path, config, engine, clock=ManualClock())
    yield one
    check_cluster(one.controller.state)
    await one.close()


async def serve(setup: Setup, replica: ReplicaId, version: VersionId, tokens: int) -> None:
    """A request of so many tokens, a third of them prompt, straight at a replica."""
    sampling = SamplingParams(max_tokens=tokens - tokens // 3, ignore_eos=True)
    request = GenerationRequest(
        request_id="q", prompt=(1,) * (tokens // 3), version_id=version, sampling=sampling
    )
    async for _ in setup.fleet.links[replica].server.generate(request):
        pass


async def end_epoch(setup: Setup, seconds: float) -> Controller:
    await setup.controller.refresh_reports()
    assert isinstance(setup.clock, ManualClock)
    setup.clock.advance(seconds)
    setup.controller.end_epoch()
    return setup.controller


async def test_what_replicas_serve_is_what_the_next_epoch_is_planned_for(
    live: Setup, samples: SampleSet
) -> None:
    controller = await live.start()
    a = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    b = await controller.register("b", str(samples.adapters["rank-16"]), replace=False)
    await serve(live, R0, a, 60)
    await serve(live, R1, a, 30)
    await serve(live, R1, b, 90)
    await end_epoch(live, 10.0)
    assert controller.demand.measured == {a: 9.0, b: 9.0}
    assert controller.state.demand_tokens_per_s == {a: 9.0, b: 9.0}
    await serve(live, R0, a, 120)
    await end_epoch(live, 10.0)
    assert controller.demand.measured == {a: 12.0}
    # Lines through 9, 12 and through 9, 0; no less than one token.
    assert controller.state.demand_tokens_per_s == {a: pytest.approx(15.0), b: 1.0}
    # Nobody has seen a whole epoch of c, and there is no other of its rank.
    c = await controller.register("c", str(samples.adapters["rank-32"]), replace=False)
    await end_epoch(live, 10.0)
    forecast = controller.state.demand_tokens_per_s
    assert forecast[c] == pytest.approx((forecast[a] + forecast[b]) / 2)
    await end_epoch(live, 10.0)
    assert c not in controller.state.demand_tokens_per_s


async def test_a_killed_controller_comes_back_with_the_demand_it_knew(
    live: Setup, samples: SampleSet
) -> None:
    controller = await live.start()
    a = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    await serve(live, R0, a, 60)
    await end_epoch(live, 10.0)
    await serve(live, R0, a, 90)
    await end_epoch(live, 10.0)
    await live.crash()
    await serve(live, R0, a, 900)
    assert isinstance(live.clock, ManualClock)
    live.clock.advance(1.5e6)  # Longer than a window.
    live.controller = live.make()
    assert live.controller.demand.history == ({a: 6.0}, {a: 9.0})
    assert live.controller.state.demand_tokens_per_s == {a: pytest.approx(12.0)}
    await live.start()
    # What was served while nobody watched is not known; what is served now is.
    await live.controller.refresh_reports()
    await serve(live, R0, a, 120)
    await end_epoch(live, 10.0)
    assert live.controller.demand.measured == {a: 12.0}
    assert live.controller.state.demand_tokens_per_s == {a: pytest.approx(15.0)}


def test_the_configuration_names_the_forecasters_that_there_are() -> None:
    known = get_args(get_type_hints(PlacementSection)["forecast"])
    assert sorted(known) == sorted(FORECASTERS)
    assert PlacementSection().forecast == DEFAULT_FORECASTER
