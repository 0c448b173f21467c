"""The scripts a person runs: arguments, the fast path, and that the demo ends what it started."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "scripts"

# Stands for the environment's `loraserve`: notes its arguments, can fail or hang at one of them.
FAKE_LORASERVE = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$1" in
  "$FAIL_AT") echo "error: told to fail" >&2; exit 1 ;;
  "$HANG_AT") echo hanging >"$HANGING"; exec sleep 60 ;;
esac
[ "$1" != replay ] || { mkdir -p "$6"; : >"$6/report.html"; }
"""
FAKE_PYTHON = '#!/bin/sh\necho "python $*" >>"$CALLS"\n'


def run(
    *command: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    # The environment that runs this suite is no part of what is tested.
    own = {key: value for key, value in os.environ.items() if key != "LORASERVE_PYTHON"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**own, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, whose .venv and output do no harm."""
    root = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, root / "scripts", ignore=shutil.ignore_patterns("__pycache__", "bench"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.parametrize("name", ["setup", "check", "demo"])
def test_help_prints_the_usage_and_does_nothing(checkout: Path, name: str) -> None:
    done = run(checkout / "scripts" / name, "--help")
    assert done.returncode == 0
    assert f"usage: scripts/{name}" in done.stdout
    assert "#" not in done.stdout
    assert "set -" not in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["setup", "--engine", "gpt"], "--engine gpt: wants vllm or emulated"),
        (["setup", "--engine"], "--engine wants a value"),
        (["setup", "--fast"], "unknown argument --fast; allowed:"),
        (["setup", "--engine", "emulated", "--cuda"], "--cuda goes with --engine vllm"),
        (["check", "all"], "takes no argument, got all"),
        (["demo", "--engine", "gpt"], "--engine gpt: wants vllm or emulated"),
        (["demo", "--out"], "wants a value"),
        (["demo", "fast"], "unknown argument fast; allowed:"),
        (["test", "--engine", "gpt"], "--engine gpt: wants vllm or emulated"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_line_and_exit_code_two(checkout: Path, command: list[str], said: str) -> None:
    done = run(checkout / "scripts" / command[0], *command[1:])
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_setup_without_a_fitting_python_says_so(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in (Path("/bin"), Path("/usr/bin")):
        for tool in folder.iterdir():
            if not tool.name.startswith("python") and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)
    done = run(checkout / "scripts" / "setup", environment={"PATH": str(tools)})
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13 on PATH" in done.stderr
    assert not (checkout / ".venv").exists()


def _stamp(checkout: Path, kind: str) -> None:
    """Make the environment look ready: the key is the one that setup itself computes."""
    probe = 'engine=emulated; eval "$(grep \'^key=\' scripts/setup)"; printf %s "$key"'
    key = run("bash", "-c", f"root=$PWD; {probe}", cwd=checkout).stdout
    assert len(key) == 64
    (checkout / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    python.chmod(0o755)
    (checkout / ".venv" / "loraserve-setup").write_text(f"{key}\n{kind}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("emulated", ["--engine", "emulated"]),
        ("vllm", []),
        ("vllm", ["--engine", "emulated"]),
        ("cuda", []),
        ("cuda", ["--cuda"]),
        ("cuda", ["--engine", "emulated"]),
    ],
)
def test_a_ready_environment_is_left_alone(checkout: Path, kind: str, arguments: list[str]) -> None:
    _stamp(checkout, kind)
    done = run(checkout / "scripts" / "setup", *arguments, cwd=Path("/"))
    assert (done.returncode, done.stdout) == (0, "setup: nothing to do\n")
    quiet = run(checkout / "scripts" / "setup", *arguments, "--quiet")
    assert (quiet.returncode, quiet.stdout) == (0, "")


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, str]:
    """An environment of fakes for scripts/demo; `CALLS` names the file of their calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("python", FAKE_PYTHON), ("loraserve", FAKE_LORASERVE)):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    return {
        "LORASERVE_PYTHON": str(programs / "python"),
        "LORASERVE_CACHE_DIR": str(tmp_path / "cache"),
        "CALLS": str(tmp_path / "calls"),
        "HANGING": str(tmp_path / "hanging"),
        "FAIL_AT": "-",
        "HANG_AT": "-",
    }


def calls(stage: dict[str, str]) -> list[str]:
    return Path(stage["CALLS"]).read_text(encoding="utf-8").splitlines()


def test_the_demo_goes_from_samples_to_the_report_and_shuts_down(
    checkout: Path, stage: dict[str, str], tmp_path: Path
) -> None:
    done = run(
        checkout / "scripts" / "demo",
        "--engine",
        "emulated",
        "--out",
        "here",
        cwd=tmp_path,
        environment=stage,
    )
    assert done.returncode == 0, done.stderr
    assert f"the report: {tmp_path}/here/report.html" in done.stdout
    verbs = [line.split()[0] for line in calls(stage)]
    assert verbs == ["python", "down", "up", *["adapter"] * 5, *["generate"] * 3, "status", "replay", "down"]
    assert "--engine emulated" in calls(stage)[2]


@pytest.mark.parametrize("verb", ["up", "adapter", "generate", "status", "replay"])
def test_a_failed_step_is_named_and_the_cluster_ends(
    checkout: Path, stage: dict[str, str], tmp_path: Path, verb: str
) -> None:
    out = str(tmp_path / "out")
    done = run(checkout / "scripts" / "demo", "--out", out, environment={**stage, "FAIL_AT": verb})
    assert done.returncode == 1
    assert "demo: failed: " in done.stderr
    assert "demo: done" not in done.stdout
    assert calls(stage)[-2].startswith(verb), "nothing runs after the failed step"
    assert calls(stage)[-1] == "down --cluster demo"


def test_a_failed_shutdown_fails_the_demo(checkout: Path, stage: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run(checkout / "scripts" / "demo", "--out", out, environment={**stage, "FAIL_AT": "down"})
    assert done.returncode == 1
    assert "demo: done" not in done.stdout


def test_keep_leaves_the_cluster_running(checkout: Path, stage: dict[str, str], tmp_path: Path) -> None:
    done = run(checkout / "scripts" / "demo", "--keep", "--out", tmp_path / "out", environment=stage)
    assert done.returncode == 0, done.stderr
    assert calls(stage)[-1].startswith("replay")
    assert "down --cluster demo" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_ends_the_cluster(
    checkout: Path, stage: dict[str, str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    os.mkfifo(stage["HANGING"])
    command = [str(checkout / "scripts" / "demo"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, **stage, "HANG_AT": "replay"}
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A suite that runs in the background inherits an ignored SIGINT, which no shell can trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as demo:
        # Ends the demo, and with it the wait below, should the fake never be called.
        alarm = threading.Timer(30.0, os.killpg, (demo.pid, signal.SIGKILL))
        alarm.start()
        try:
            assert Path(stage["HANGING"]).read_text(encoding="utf-8") == "hanging\n"
            # As a terminal does: to the whole group.
            os.killpg(demo.pid, number)
            assert demo.wait(timeout=30) == code
        finally:
            alarm.cancel()
    assert calls(stage)[-1] == "down --cluster demo"


def test_the_suite_runs_from_any_directory_with_the_callers_paths(
    checkout: Path, stage: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "test_one.py").write_text("", encoding="utf-8")
    done = run(
        checkout / "scripts" / "test",
        "-x",
        "test_one.py::test_a",
        "-k",
        "some words",
        cwd=tmp_path,
        environment=stage,
    )
    assert done.returncode == 0, done.stderr
    assert calls(stage) == [f"python -m pytest -x {tmp_path}/test_one.py::test_a -k some words"]
