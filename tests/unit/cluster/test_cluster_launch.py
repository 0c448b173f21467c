"""What `down` ends after a start that was interrupted, and when the Ray cluster does not answer."""

import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from loraserve.cluster import launch
from loraserve.cluster.processes import RUN_ID_VARIABLE, processes_of
from loraserve.cluster.state import RunningCluster, cluster_dir, read_running, write_running
from loraserve.config import Config, config_tree, parse_config
from loraserve.errors import WorkFailedError

# Nothing listens there, and `down` says so when it looks.
NO_RAY = "127.0.0.1:1"


def config_in_ray(folder: Path) -> Config:
    return parse_config(
        {
            "cluster": {"name": "c", "state_dir": str(folder), "ray_address": NO_RAY},
            "engine": {"kind": "emulated"},
        }
    )


def test_a_head_that_died_before_the_name_was_free_has_nothing_in_the_ray_cluster(tmp_path: Path) -> None:
    config = config_in_ray(tmp_path)
    folder = cluster_dir("c", str(tmp_path))
    folder.mkdir()
    spec = {"config": config_tree(config), "insecure_listen": False, "foreground": False}
    head = launch._spawn_head(config, folder, "never-swept", spec)
    with head:
        head.kill()
    running = read_running(folder)
    assert running is not None
    assert running.head_pid == head.pid
    steps: list[str] = []
    assert launch.down("c", str(tmp_path), on_step=steps.append)
    assert steps == ["cleaning up after cluster c, which died"]
    assert os.listdir(folder) == ["logs"]


def test_a_ray_cluster_that_does_not_answer_is_one_line_and_what_is_here_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Takes connections and knows nothing of Ray.
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setattr(launch, "SWEEP_TIMEOUT_S", 0.01)
    run_id = uuid.uuid4().hex
    folder = cluster_dir("c", str(tmp_path))
    folder.mkdir()
    lost = subprocess.Popen(
        [sys.executable, "-S", "-c", "print('up', flush=True); input()"],
        env={**os.environ, RUN_ID_VARIABLE: run_id},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with lost:
        assert lost.stdout is not None
        assert lost.stdout.readline()
        # The ticks are of no process: the head has died.
        died = RunningCluster(
            name="c",
            run_id=run_id,
            head_pid=lost.pid,
            head_start_ticks=0,
            ray_address=address,
            ray_goes_on=True,
        )
        write_running(folder, died)
        try:
            with pytest.raises(
                WorkFailedError, match=rf"cannot end cluster c .* {address}: no answer within"
            ):
                launch.down("c", str(tmp_path))
            assert processes_of(run_id) == []
        finally:
            lost.kill()
            server.stop(None).wait()
    assert read_running(folder) == died, "so that `down` can be tried again"
