"""The guard that ends an engine process with its parent, tried on small processes without vLLM."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from loraserve.engines.vllm_guard import PARENT_PID, PARENT_START, process_start, watch_parent

STAY = """
import sys
from loraserve.engines.vllm_guard import watch_parent

watch_parent()
watch_parent()
print("up", flush=True)
sys.stdin.read()
"""


def child(pid: int | str, started: str | None = None) -> subprocess.Popen[str]:
    """A process under the guard, which ends by itself when its standard input is closed."""
    environment = {**os.environ, PARENT_PID: str(pid)}
    if started is not None:
        environment[PARENT_START] = started
    return subprocess.Popen(
        [sys.executable, "-c", STAY],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with process:
        yield process
        process.kill()


def ended(process: subprocess.Popen[str]) -> int:
    """How the process ended, its input still open."""
    with process:
        try:
            return process.wait(5)
        finally:
            process.kill()


def test_the_child_ends_when_its_parent_is_killed(parent: subprocess.Popen[bytes]) -> None:
    guarded = child(parent.pid, process_start(parent.pid))
    assert guarded.stdout is not None
    assert guarded.stdout.readline() == "up\n"
    assert guarded.poll() is None
    parent.kill()
    assert ended(guarded) == -signal.SIGKILL


def test_the_child_ends_at_once_when_its_parent_is_gone_already(parent: subprocess.Popen[bytes]) -> None:
    parent.kill()
    parent.wait()
    assert ended(child(parent.pid)) == -signal.SIGKILL


def test_another_process_with_the_parents_number_is_not_the_parent(parent: subprocess.Popen[bytes]) -> None:
    assert ended(child(parent.pid, started="1")) == -signal.SIGKILL


@pytest.mark.parametrize("pid", ["", "no number"])
def test_without_a_parent_named_nothing_is_watched(pid: str) -> None:
    unguarded = child(pid)
    assert unguarded.communicate(timeout=20)[0] == "up\n"
    assert unguarded.returncode == 0


def test_a_process_does_not_watch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    before = threading.active_count()
    monkeypatch.setenv(PARENT_PID, str(os.getpid()))
    watch_parent()
    assert threading.active_count() == before


def test_the_guard_imports_the_standard_library_only() -> None:
    code = (
        "import sys; import loraserve.engines.vllm_guard; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['__main__', 'loraserve']"


def test_the_start_of_no_process_is_empty() -> None:
    assert process_start(2**22 + 1) == ""
    assert process_start(os.getpid()).isdigit()
