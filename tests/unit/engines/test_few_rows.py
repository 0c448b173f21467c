"""The compiled kernel for a few rows per adapter: its numbers against float64, and how it is built."""

import os
import shutil
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engines.vllm_lora import few_rows
from loraserve.engines.vllm_lora.few_rows import BuildError, build
from tests.support.kernel_layers import NUMBERS, Adapter, Number, Step, wrong_of

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc) is installed here")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel, built for this machine."""
    return build(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def kernels(library: Path) -> dict[str, Any]:
    """The C functions by type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(few_rows.LIBRARY, str(library))
        return {number.name: few_rows.load(number.name) for number in NUMBERS}


@st.composite
def steps(draw: st.DrawFn, num_slots: int) -> Step:
    """Spans of 1 to 33 rows with rows of the base model around them, in place or picked by an order."""
    slots = draw(st.permutations(range(num_slots)))[: draw(st.integers(1, num_slots))]
    lengths = [draw(st.integers(1, 33)) for _ in slots]
    gaps = [draw(st.integers(0, 2)) for _ in slots]
    picked = draw(st.booleans())
    spans, at = [], 0
    for slot, length, gap in zip(slots, lengths, gaps, strict=True):
        at += 0 if picked else gap
        spans.append((slot, at, at + length))
        at += length
    num_rows = sum(lengths) + sum(gaps)
    order = draw(st.permutations(range(num_rows)))[: sum(lengths)] if picked else None
    return Step(num_rows=num_rows, spans=spans, order=order)


RANKS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 127, 128, 130])
WIDTHS = st.sampled_from([1, 3, 15, 16, 17, 31, 33, 64, 100, 129])


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(
    step=steps(4),
    width=WIDTHS,
    outputs=st.lists(WIDTHS, min_size=1, max_size=3),
    ranks=st.lists(st.lists(RANKS | st.just(0), min_size=3, max_size=3), min_size=4, max_size=4),
    number=st.sampled_from(NUMBERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_row_gets_its_own_adapter_at_its_own_rank(
    kernels: dict[str, Any],
    step: Step,
    width: int,
    outputs: list[int],
    ranks: Sequence[Sequence[int]],
    number: Number,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    slots = [
        # A slot that is empty, or whose adapter leaves the layer alone.
        Adapter(number, width, list(zip(own, outputs, strict=False)), rng)
        if any(own[: len(outputs)])
        else None
        for own in ranks
    ]
    assert not wrong_of(kernels[number.name], number, step, slots, width=width, outputs=sum(outputs), rng=rng)


@needs_compiler
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_work_that_is_worth_several_threads_is_shared_without_a_gap(
    kernels: dict[str, Any], number: Number
) -> None:
    rng = np.random.default_rng(1)
    outputs = [1030, 515, 70]
    slots = [
        Adapter(number, 1027, list(zip((rank,) * 3, outputs, strict=True)), rng) for rank in (128, 8, 61)
    ]
    step = Step(num_rows=44, spans=[(2, 0, 1), (0, 1, 34), (1, 36, 40)])
    for _ in range(3):
        assert not wrong_of(kernels[number.name], number, step, slots, width=1027, outputs=1615, rng=rng)


@needs_compiler
def test_a_wrong_result_would_be_noticed(kernels: dict[str, Any]) -> None:
    """The comparison itself: the kernel is given the adapter of another slot."""
    rng, number = np.random.default_rng(2), NUMBERS[0]
    adapters = [Adapter(number, 33, [(4, 17)], rng) for _ in range(2)]
    step = Step(num_rows=3, spans=[(0, 0, 2)])
    described = adapters[0].described.copy()
    adapters[0].described[:] = adapters[1].described
    assert "off by" in wrong_of(kernels["float32"], number, step, adapters, width=33, outputs=17, rng=rng)
    adapters[0].described[:] = described
    assert not wrong_of(kernels["float32"], number, step, adapters, width=33, outputs=17, rng=rng)


# -- building ------------------------------------------------------------------------------------


def compiler(directory: Path, script: str) -> Path:
    """A compiler that is a shell script."""
    path = directory / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_compiler
def test_it_is_built_once_and_whole_whoever_builds_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CC", str(compiler(tmp_path, f'echo call >> "{calls}"\nexec "{COMPILER}" -O0 "$@"')))
    cache = tmp_path / "cache" / "kernels"
    with ThreadPoolExecutor(3) as executor:
        made = {one.result() for one in [executor.submit(build, cache) for _ in range(3)]}
    (path,) = made
    assert list(cache.iterdir()) == [path]
    before = calls.read_text()
    assert build(cache) == path
    assert calls.read_text() == before


@needs_compiler
def test_another_compiler_makes_another_library(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(compiler(tmp_path, f'exec "{COMPILER}" -O0 "$@"')))
    assert build(tmp_path).name != library.name


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("printf 'no\\377 OpenMP\\nmore\\n' >&2; exit 1", "compiler failed: no. OpenMP$"),
        ("exit 3", "compiler failed: exit code 3$"),
        ("exit 0", "compiler failed: .*No such file"),
        ("kill -9 $$", "compiler failed: exit code -9$"),
    ],
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.setenv("CC", str(compiler(tmp_path, script)))
    with pytest.raises(BuildError, match=message) as failure:
        build(tmp_path / "cache")
    assert "\n" not in str(failure.value)
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match=r"^there is no C compiler \(cc\)$"):
        build(tmp_path / "cache")


@needs_compiler
def test_a_folder_that_cannot_be_made_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="file"):
        build(tmp_path / "file" / "kernels")


def test_where_nothing_was_built_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(few_rows.LIBRARY, raising=False)
    assert few_rows.load("float32") is None
    monkeypatch.setenv(few_rows.LIBRARY, os.devnull)
    assert few_rows.load("float16") is None


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF cut off"])
def test_a_library_that_cannot_be_loaded_leaves_the_engine_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    library = tmp_path / "few_rows.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setenv(few_rows.LIBRARY, str(library))
    assert few_rows.load("float32") is None
    assert "runs without its compiled kernel" in caplog.text


@needs_compiler
@pytest.mark.parametrize("word", ["flags", "Features"])
def test_another_processor_gets_another_library(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Also in a folder that machines of both kinds share."""
    monkeypatch.setattr(few_rows, "_CPUINFO", tmp_path / "cpuinfo")
    names = set()
    for able in ("one two", "one two three"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{word}\t: {able}\n")
        names.add(build(tmp_path).name)
    assert len(names | {library.name}) == 3
