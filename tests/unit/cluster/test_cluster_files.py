"""How the command line finds a running cluster again, and when it does not."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraserve.cluster.state import (
    RunningCluster,
    cluster_dir,
    is_alive,
    read_running,
    router_addresses,
    start_ticks,
    write_running,
)
from loraserve.errors import NotFoundError
from loraserve.folders import cache_dir


def running_here(**changes: object) -> RunningCluster:
    """A cluster whose head is this test's process."""
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    one = RunningCluster(
        name="c",
        run_id="r",
        head_pid=os.getpid(),
        head_start_ticks=ticks,
        router_addresses=("127.0.0.1:1", "127.0.0.1:2"),
    )
    return dataclasses.replace(one, **changes)  # type: ignore[arg-type]


@contextmanager
def child(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A python process that has printed a line, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_what_is_written_is_read_and_nothing_else_stays(tmp_path: Path) -> None:
    for one in (running_here(), running_here(ready=True, temp_dir="/x", controller_address="127.0.0.1:3")):
        write_running(tmp_path, one)
        assert read_running(tmp_path) == one
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    names = ["c", "d" * 200_000]
    write_running(tmp_path, running_here())
    done = threading.Event()

    def rewrite() -> None:
        for turn in range(60):
            write_running(tmp_path, running_here(name=names[turn % 2]))
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        while not done.is_set():
            seen = read_running(tmp_path)
            assert seen is not None
            assert seen.name in names
    finally:
        writer.join()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b"{}",
        b'{"name": "c", "run_id": "r", "head_pid": "1", "head_start_ticks": 1}',
        b'{"name": "c", "run_id": "r", "head_pid": 999999999, "head_start_ticks": null}',
        b'{"name": "c", "run_id": "r", "head_pid": 1, "head_start_ticks": 1, "router_addresses": "abc"}',
    ],
)
def test_garbage_is_no_cluster(tmp_path: Path, content: bytes) -> None:
    folder = cluster_dir("c", str(tmp_path))
    folder.mkdir()
    (folder / "cluster.json").write_bytes(content)
    assert read_running(folder) is None
    with pytest.raises(NotFoundError, match="no cluster named c is running"):
        router_addresses("c", str(tmp_path))


def test_keys_of_a_later_release_do_not_hide_a_cluster(tmp_path: Path) -> None:
    tree = {**dataclasses.asdict(running_here()), "colour": "blue"}
    (tmp_path / "cluster.json").write_text(json.dumps(tree), encoding="utf-8")
    assert read_running(tmp_path) == running_here()


def test_the_routers_of_a_live_cluster_are_its_addresses(tmp_path: Path) -> None:
    folder = cluster_dir("c", str(tmp_path))
    folder.mkdir()
    addresses = ("127.0.0.1:1", "127.0.0.1:2")
    write_running(folder, running_here(router_addresses=addresses))
    assert router_addresses("c", str(tmp_path)) == addresses


def test_a_cluster_that_starts_has_no_address_yet(tmp_path: Path) -> None:
    folder = cluster_dir("c", str(tmp_path))
    folder.mkdir()
    write_running(folder, running_here(router_addresses=()))
    with pytest.raises(NotFoundError, match=r"cluster c is still starting"):
        router_addresses("c", str(tmp_path))


def test_a_cluster_that_never_was_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no cluster named c .*`loraserve up`.*--address"):
        router_addresses("c", str(tmp_path))


def test_a_dead_head_is_no_cluster(tmp_path: Path) -> None:
    with child("print('up', flush=True); input()") as process:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        one = running_here(head_pid=process.pid, head_start_ticks=ticks)
        assert is_alive(one)
        process.kill()
        # Dead, but not collected by its parent: that is not alive either.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(one)
    assert not is_alive(one)
    folder = cluster_dir("c", str(tmp_path))
    folder.mkdir()
    write_running(folder, one)
    with pytest.raises(NotFoundError, match="no cluster named c is running"):
        router_addresses("c", str(tmp_path))


def test_another_process_under_the_old_pid_is_no_cluster() -> None:
    one = running_here()
    assert is_alive(one)
    assert not is_alive(dataclasses.replace(one, head_start_ticks=one.head_start_ticks - 1))


def test_a_process_with_a_strange_name_is_told_apart_by_its_start() -> None:
    name = rb") R 1 \xff("
    code = f"open('/proc/self/comm', 'wb').write({name!r}); print('up', flush=True); input()"
    with child(code) as process:
        ticks = start_ticks(process.pid)
        here = start_ticks(os.getpid())
        assert ticks is not None
        assert here is not None
        assert ticks >= here


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "mine"))
    assert cluster_dir("c") == tmp_path / "mine" / "clusters" / "c"
    monkeypatch.delenv("LORASERVE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "loraserve"
