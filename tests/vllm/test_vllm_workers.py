"""The threads that prepare adapters in a vLLM worker."""

import threading

import pytest

from loraserve.pace import Pace

WAIT_S = 10.0


def test_pieces_are_done_by_several_threads_and_come_in_their_order() -> None:
    from loraserve.engines.vllm_lora.workers import Workers

    threads: set[str] = set()

    def piece(number: int) -> int:
        threads.add(threading.current_thread().name)
        return 2 * number

    workers = Workers(Pace())
    assert workers.each(piece, range(100)) == list(range(0, 200, 2))
    assert workers.each(piece, []) == []
    busy = Workers(Pace(is_busy=lambda: True))
    threads.clear()
    assert busy.each(piece, range(100)) == list(range(0, 200, 2))
    assert threads == {threading.current_thread().name}


@pytest.mark.parametrize("in_helper", [True, False])
def test_what_fails_in_any_thread_is_raised(monkeypatch: pytest.MonkeyPatch, in_helper: bool) -> None:
    from loraserve.engines.vllm_lora.workers import Workers

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    both_here = threading.Barrier(2)

    def piece(number: int) -> None:
        if number < 2:
            both_here.wait(WAIT_S)
            if threading.current_thread().name.startswith("loraserve-help") == in_helper:
                raise IndexError("no room for it")

    workers = Workers(Pace())
    with pytest.raises(IndexError, match="no room for it"):
        workers.each(piece, range(10))
