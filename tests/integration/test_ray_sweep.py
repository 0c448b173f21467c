"""A sweep on a Ray cluster gives what a sweep on this machine gives."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.support.cli import CODE, run_cli
from tests.support.ray_nodes import ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TIMEOUT_S = 120.0
SIMULATE = ("simulate", "demo", "--replicas", "2", "--policy", "least-loaded,slora-random", "--json")
OF_THIS_MACHINE = ("wall_s", "judging_s", "simulated_requests_per_s")


def told(text: str) -> list[dict[str, object]]:
    runs: list[dict[str, object]] = json.loads(text)["runs"]
    return [{key: value for key, value in run.items() if key not in OF_THIS_MACHINE} for run in runs]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.parquet")
        if path.is_file()
    }


async def test_a_sweep_as_ray_tasks_is_the_same_as_in_processes(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    with ray_nodes(tmp_path, cpus=2) as nodes:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CODE, *SIMULATE, "--ray", nodes.address, "--out", str(there)),
            env={**os.environ, **nodes.environment},
            stdout=PIPE,
            stderr=PIPE,
        )
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    ran = await run_cli(*SIMULATE, "--out", str(here))
    assert told(stdout.decode()) == told(ran.stdout)
    assert len(files_of(here)) == 2 * 4
    assert files_of(there) == files_of(here)


async def test_an_address_where_no_ray_answers_is_one_line() -> None:
    ran = await run_cli(*SIMULATE, "--ray", "127.0.0.1:1")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: no Ray cluster answers at 127.0.0.1:1")
    ran = await run_cli(*SIMULATE, "--ray", "nonsense")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: --ray: nonsense is neither auto nor HOST:PORT")
