"""The built wheel in an empty environment: it installs, explains itself and runs a cluster."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path, timeout_s: float = 120.0, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, timeout_s=300.0)
    found = list(folder.glob("loraserve-*.whl"))
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="session")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel and its base dependencies alone."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-compile", wheel, timeout_s=280.0)
    return folder / "bin"


def test_the_wheel_holds_the_three_packages_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"loraserve", "placement", "traces"}
    assert "loraserve/py.typed" in names
    assert "loraserve/rpc/v1/inference_pb2.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".proto"))]


def test_the_wheel_carries_what_the_checkout_s_packages_hold(wheel: Path) -> None:
    """A data file (a bundled trace, a template) that the build left out would show only after a release."""
    tracked = run("git", "-C", ROOT, "ls-files", "loraserve", "placement", "traces").splitlines()
    with zipfile.ZipFile(wheel) as archive:
        assert set(tracked) <= set(archive.namelist())


@pytest.mark.timeout(600)
def test_the_base_install_is_light(empty_environment: Path) -> None:
    installed = json.loads(run(empty_environment / "python", "-m", "pip", "list", "--format=json"))
    names = {package["name"].lower().replace("_", "-") for package in installed}
    assert names & {"ray", "grpcio", "numpy", "typer"} == {"ray", "grpcio", "numpy", "typer"}
    heavy = {name for name in names if name.startswith(("torch", "vllm", "nvidia-", "ucx", "cupy", "triton"))}
    assert heavy == set()


@pytest.mark.timeout(600)
def test_the_installed_command_explains_itself(empty_environment: Path) -> None:
    told = run(empty_environment / "loraserve", "--help")
    for name in ("up", "down", "status", "adapter", "generate", "replay", "doctor"):
        assert f"\n  {name} " in told
    assert run(empty_environment / "loraserve", "--version").strip()


@pytest.mark.timeout(600)
def test_the_installed_doctor_finds_nothing_that_fails(empty_environment: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORASERVE_CACHE_DIR": str(tmp_path)}
    told = json.loads(run(empty_environment / "loraserve", "doctor", "--json", environment=environment))
    assert told["ok"] is True
    engine = next(row for row in told["checks"] if row["name"] == "engine")
    assert engine["status"] == "warn"
    assert "emulated" in engine["advice"]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_installed_wheel_serves_an_emulated_cluster(empty_environment: Path, tmp_path: Path) -> None:
    program = empty_environment / "loraserve"
    # What the checkout's own environment would lend must not be what makes it work.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"LORASERVE_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    name = f"wheel-{os.getpid()}"
    here = ("--cluster", name)

    def loraserve(*arguments: str | Path) -> str:
        return run(program, *arguments, *here, environment=environment)

    samples = json.loads(
        run(
            empty_environment / "python", "-m", "loraserve.samples", tmp_path / "samples", "--json",
            environment=environment,
        )
    )  # fmt: skip
    loraserve("up", "--engine", "emulated", "--model", samples["model"], "--replicas", "1", "--port", "0")
    try:
        loraserve("adapter", "add", "rank-8", samples["adapters"]["rank-8"])
        answer = json.loads(
            loraserve(
                "generate", "--adapter", "rank-8", "--max-tokens", "5", "--ignore-eos", "--json", "Hello"
            )
        )
        assert answer["output_tokens"] == 5
        assert answer["adapter_version"].startswith("rank-8@")
    finally:
        told = json.loads(loraserve("down", "--json"))
    assert told["was_running"] is True
