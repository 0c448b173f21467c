"""The service and a replay as Ray jobs, in a Ray cluster with its job server and a token."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


def follow_until_serving(live: LiveCluster, nodes: RayNodes, samples: SampleSet) -> str:
    """Submit the service, press Ctrl-C once it serves, and return the job's id: the job goes on."""
    command = [
        sys.executable, "-m", "loraserve.cli.main", "submit", "--ray-address", nodes.dashboard,
        "up", "--engine", "emulated", "--model", str(samples.model), "--port", "0", "--cluster", live.name,
    ]  # fmt: skip
    environment = {**os.environ, **live.environment, "LORASERVE_CACHE_DIR": str(live.cache)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        assert following.stderr is not None
        try:
            log = next((line for line in following.stdout if "serves at 127.0.0.1:" in line), "")
            following.send_signal(signal.SIGINT)
            _, said = following.communicate(timeout=START_S)
        finally:
            following.kill()
    assert log, f"the service did not start: {said}"
    assert following.returncode == 130, said
    job_id = said.split()[2]
    assert f"no longer following job {job_id}" in said
    assert f"ray job stop --address {nodes.dashboard} {job_id}" in said
    assert "Traceback" not in said
    return job_id


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

        service = follow_until_serving(live, nodes, samples)
        run_id = live.running().run_id
        live.call("adapter", "add", "rank-8", str(samples.adapters["rank-8"]))

        # Side by side: a job takes seconds to begin.
        options = ("--speedup", "20", "--limit", "20", "--cluster", live.name)
        with ThreadPoolExecutor() as pool:
            good, bad = pool.map(
                lambda trace: live.run(*submit, "replay", trace, *options), ("demo", "no-such-trace")
            )
        assert good.returncode == 0, good.stderr
        end = json.loads(good.stdout)
        assert (end["status"], end["exit_code"]) == ("succeeded", 0)
        assert end["result"]["overall"]["requests"] == 20
        assert bad.returncode == json.loads(bad.stdout)["exit_code"] == 2

        stop_job(nodes, service)
        live.call("down")
        assert nodes.leftovers(live.name) == {"actors": 0, "groups": 0}
        assert processes_of(run_id) == []
        assert not (live.folder / "cluster.json").exists()
