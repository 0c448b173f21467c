"""What `down` ends after a start that was interrupted, and when the Ray cluster does not answer."""

import os
from pathlib import Path

from loraserve.cluster import launch
from loraserve.cluster.state import cluster_dir, read_running
from loraserve.config import Config, config_tree, parse_config

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
