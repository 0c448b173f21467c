"""Ending all processes of a run, those that do not listen included, and reading logs."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.cluster.processes import (
    RUN_ID_VARIABLE,
    TAIL_BYTES,
    end_processes,
    processes_of,
    tail,
)

# A parent and two children in sessions of their own; each prints its pid and then waits for ever.
TREE = """
import os, signal, sys, time
{setup}
for _ in range({children}):
    if os.fork() == 0:
        os.setsid()
        break
os.write(1, b"%d\\n" % os.getpid())
while True:
    time.sleep(60)
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"


@contextmanager
def tree(run_id: str, *, setup: str = "", children: int = 2) -> Iterator[list[int]]:
    """The pids of a process tree of this run, the root's last; all are gone at the end."""
    environment = {**os.environ, RUN_ID_VARIABLE: run_id}
    code = TREE.format(setup=setup, children=children)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as root:
        assert root.stdout is not None
        try:
            yield sorted(int(root.stdout.readline()) for _ in range(children + 1))
        finally:
            for pid in processes_of(run_id):
                os.kill(pid, 9)
            # The pipe ends when the last process that holds it has.
            root.stdout.read()


def new_run_id() -> str:
    return uuid.uuid4().hex


def test_the_processes_of_a_run_are_found_by_their_environment() -> None:
    run_id = new_run_id()
    with tree(run_id) as pids, tree(run_id + "0", children=0):
        assert sorted(processes_of(run_id)) == pids
    assert processes_of(run_id) == []


def test_a_tree_that_listens_ends_before_the_grace_does() -> None:
    run_id = new_run_id()
    with tree(run_id):
        assert end_processes(run_id, grace_s=60.0) == 3
        assert processes_of(run_id) == []


def test_a_tree_that_ignores_the_signal_is_killed() -> None:
    run_id = new_run_id()
    with tree(run_id, setup=STUBBORN), tree(run_id, setup=STUBBORN, children=0):
        assert end_processes(run_id, grace_s=0.1) == 4
        assert processes_of(run_id) == []


def test_other_runs_are_left_alone() -> None:
    run_id, other = new_run_id(), new_run_id()
    with tree(other, children=0) as spared:
        assert end_processes(run_id, grace_s=0.0) == 0
        assert processes_of(other) == spared


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert tail(log) == ""
    assert tail(tmp_path) == ""
    log.write_text("", encoding="utf-8")
    assert tail(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(100)), encoding="utf-8")
    assert tail(log, lines=3) == "line 97\nline 98\nline 99"
    assert tail(log).count("\n") == 19


def test_the_tail_of_a_huge_or_broken_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes("é".encode() * TAIL_BYTES + b"\xff\nlast")
    text = tail(log, lines=2)
    assert text.endswith("\ufffd\nlast")
    assert len(text) <= TAIL_BYTES


def test_output_goes_to_the_log_children_included(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    code = (
        "import os, sys; from pathlib import Path; from loraserve.cluster.processes import redirect_output;"
        f"print('before'); redirect_output(Path({str(log)!r})); print('out', flush=True);"
        "print('err', file=sys.stderr); os.system('echo child')"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "before\n"
    assert log.read_text(encoding="utf-8").split() == ["out", "err", "child"] * 2
