"""What `bench fetch` makes of its times: spreads, from which size a peer is faster, and the plot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.bench.fetch_figures import (
    FetchRow,
    SecondsSpread,
    Source,
    faster_from_bytes,
    faster_table,
    spread_s,
)
from loraserve.bench.fetch_plot import draw_fetch

MIB = 1024**2


def row(size_mib: int, source: Source, seconds: float, active_s: float | None = None) -> FetchRow:
    def spread(value: float) -> SecondsSpread:
        return SecondsSpread(median_s=value, p25_s=0.9 * value, p75_s=1.1 * value, samples=3)

    return FetchRow(
        label=f"{size_mib}MiB",
        rank=8,
        size_bytes=size_mib * MIB,
        source=source,
        resident=spread(seconds),
        active=None if active_s is None else spread(active_s),
    )


def rows(ucx_s: list[float], disk_s: list[float]) -> list[FetchRow]:
    pairs = zip(ucx_s, disk_s, strict=True)
    return [
        one
        for place, (ucx, disk) in enumerate(pairs)
        for one in (row(2**place, "ucx", ucx), row(2**place, "cold_disk", disk))
    ]


@pytest.mark.parametrize(
    ("ucx_s", "disk_s", "mib"),
    [
        ([1, 1, 1], [2, 2, 2], 1),
        ([3, 1, 1], [2, 2, 2], 2),
        ([1, 3, 1], [2, 2, 2], 4),  # faster once, and then not: it counts from where it stays so
        ([1, 1, 3], [2, 2, 2], None),
        ([2, 2, 2], [2, 2, 2], None),
    ],
)
def test_a_peer_is_faster_from_the_size_from_which_on_it_always_is(
    ucx_s: list[float], disk_s: list[float], mib: int | None
) -> None:
    found = faster_from_bytes(rows(ucx_s, disk_s), "ucx", "cold_disk")
    assert found == (None if mib is None else mib * MIB)


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=1, max_size=8))
def test_from_the_size_that_is_named_on_every_size_is_faster_and_the_one_before_is_not(
    times: list[tuple[float, float]],
) -> None:
    ucx_s, disk_s = [one for one, _ in times], [other for _, other in times]
    found = faster_from_bytes(rows(ucx_s, disk_s), "ucx", "cold_disk")
    first = len(times) if found is None else (found // MIB).bit_length() - 1
    assert all(ucx < disk for ucx, disk in times[first:])
    assert first == 0 or times[first - 1][0] >= times[first - 1][1]


def test_only_what_was_measured_is_compared() -> None:
    found = faster_table([row(1, "tcp", 1.0), row(1, "origin", 2.0), row(2, "tcp", 1.0)])
    assert found == {"tcp": {"origin": MIB}}
    assert faster_from_bytes([row(1, "tcp", 1.0)], "tcp", "origin") is None


def test_a_row_has_its_rate_and_a_spread_holds_its_median() -> None:
    assert row(1, "tcp", 0.5).bytes_per_s == 2 * MIB
    found = spread_s([0.3, 0.1, 0.2])
    assert (found.p25_s, found.median_s, found.p75_s, found.samples) == pytest.approx((0.15, 0.2, 0.25, 3))
    with pytest.raises(ValueError, match="no repetitions"):
        spread_s([])


def test_the_plot_is_the_same_for_the_same_run_and_marks_where_a_peer_pays() -> None:
    measured = [
        *rows([3, 1, 1], [2, 2, 2]),
        *(row(2**place, "page_cache", 0.5) for place in range(3)),
    ]
    svg = draw_fetch(measured, "svg")
    assert svg == draw_fetch(measured, "svg")
    assert b"ucx beats the disk from here" in svg
    assert b"beats the page cache" not in svg
    assert b"active in a slot" not in svg
    assert b"active in a slot" in draw_fetch([row(1, "tcp", 1.0, 2.0)], "svg")
    assert draw_fetch(measured, "png").startswith(b"\x89PNG")
