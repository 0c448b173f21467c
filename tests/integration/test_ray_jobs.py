"""The service and a replay as Ray jobs, in a Ray cluster with its job server and a token."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraserve.cluster.processes import processes_of
from loraserve.samples import SampleSet
from tests.support.live_cluster import LiveCluster
from tests.support.ray_nodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START_S = 120.0
STOP = """
import sys
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
assert client.stop_job(sys.argv[2])
"""


def wait_serving(live: LiveCluster) -> None:
    """Wait until the cluster's file says that it serves."""
    deadline_s = time.monotonic() + START_S
    file = live.folder / "cluster.json"
    while not (file.exists() and live.running().ready):
        assert time.monotonic() < deadline_s, "the service did not start"
        time.sleep(0.1)


def stop_job(nodes: RayNodes, job_id: str) -> None:
    subprocess.run(
        [sys.executable, "-c", STOP, nodes.dashboard, job_id],
        env={**os.environ, **nodes.environment},
        check=True,
        timeout=START_S,
    )


def test_the_service_and_a_replay_run_as_jobs_and_nothing_outlives_them(
    tmp_path: Path, samples: SampleSet
) -> None:
    with ray_nodes(tmp_path, cpus=2, dashboard=True) as nodes:
        live = LiveCluster(cache=tmp_path / "cache", name="job", environment=nodes.environment)
        submit = ("submit", "--json", "--ray-address", nodes.dashboard)
        refused = LiveCluster(cache=tmp_path, environment={"RAY_AUTH_MODE": "disabled"})
        done = refused.run(*submit, "up")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "RAY_AUTH_TOKEN_PATH=FILE" in done.stderr

        done = live.run(
            *submit, "--no-wait", "up", "--engine", "emulated", "--model", str(samples.model), "--port", "0",
            "--cluster", live.name,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        service = json.loads(done.stdout)["job_id"]
        wait_serving(live)
        run_id = live.running().run_id
        live.call("adapter", "add", "rank-8", str(samples.adapters["rank-8"]))

        done = live.run(*submit, "replay", "demo", "--speedup", "20", "--limit", "20", "--cluster", live.name)
        assert done.returncode == 0, done.stderr
        end = json.loads(done.stdout)
        assert (end["status"], end["exit_code"]) == ("succeeded", 0)
        assert end["result"]["overall"]["requests"] == 20
        done = live.run(*submit, "replay", "no-such-trace", "--cluster", live.name)
        assert done.returncode == json.loads(done.stdout)["exit_code"] == 2

        stop_job(nodes, service)
        live.call("down")
        assert nodes.leftovers(live.name) == {"actors": 0, "groups": 0}
        assert processes_of(run_id) == []
        assert not (live.folder / "cluster.json").exists()
