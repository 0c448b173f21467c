"""Clients from other projects, each in a process of its own, against a real router and emulated replicas."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import proto_compat
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from loraserve import __version__
from loraserve.client import Client
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from tests.support.local_cluster import LocalCluster, local_cluster

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
INSTALL_TIMEOUT_S = 240.0
CALLS_TIMEOUT_S = 120.0
UNREACHABLE = ("No matching distribution found", "connection broken", "timed out")
"""What pip says when there is no registry, or none that has the package."""


@pytest.fixture
async def cluster(tmp_path: Path, samples: SampleSet) -> AsyncIterator[LocalCluster]:
    async with local_cluster(tmp_path, samples) as one:
        yield one


@pytest.fixture(scope="session")
def triton_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with tritonclient, whose protobuf and descriptors must not meet ours.

    LORASERVE_TEST_ENVS names a folder to keep it in; without, it lasts for this run.
    """
    kept = os.environ.get("LORASERVE_TEST_ENVS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("envs")
    home = folder / f"tritonclient-{sys.version_info.major}.{sys.version_info.minor}"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--retries",
            "1",
            "tritonclient[grpc]>=2.60",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
        if done.returncode != 0 and any(word in done.stderr for word in UNREACHABLE):
            pytest.skip("no package registry within reach has tritonclient[grpc]")
        assert done.returncode == 0, done.stderr[-3000:]
        complete.touch()
    return python


async def run(*command: str) -> str:
    """The output of a client that must succeed, while this loop runs the server."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(CALLS_TIMEOUT_S):
            stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, stderr.decode()[-4000:]
    return stdout.decode()


async def native(cluster: LocalCluster, models: list[str]) -> dict[str, str]:
    """What the project's own client gets; '' is the base model, here called model."""
    async with Client(cluster.address) as client:
        answers = await asyncio.gather(
            *(
                client.complete(PROMPT, adapter="" if name == "model" else name, sampling=GREEDY)
                for name in models
            )
        )
    return {name: answer.step.text for name, answer in zip(models, answers, strict=True)}


@pytest.mark.slow
async def test_tritonclient_calls_every_method_it_has_for_us(
    cluster: LocalCluster, samples: SampleSet, triton_python: Path
) -> None:
    models = ["rank-8", "rank-64", "model"]
    expected = await native(cluster, models)
    assert len(set(expected.values())) == len(models), "the models must be told apart by their answers"
    script = str(SUPPORT / "triton_calls.py")
    seen: dict[str, Any] = json.loads(await run(str(triton_python), script, cluster.address, *models))

    assert (seen["live"], seen["ready"]) == (True, True)
    assert seen["model_ready"] == {**dict.fromkeys(models, True), "nobody": False}
    assert (seen["server"]["name"], seen["server"]["version"]) == ("loraserve", __version__)
    assert seen["metadata"]["name"] == "rank-8"
    assert seen["config"]["config"]["model_transaction_policy"]["decoupled"] is True
    assert {model["name"] for model in seen["index"]["models"]} == {"model", *samples.adapters}

    assert seen["infer"] == expected
    assert expected["rank-8"].startswith(seen["parameters"])
    status, message = seen["unknown_model"]
    assert (status, message.partition(":")[0]) == ("StatusCode.NOT_FOUND", "model_name")
    status, message = seen["unknown_input"]
    assert (status, message.partition(":")[0]) == ("StatusCode.INVALID_ARGUMENT", "image")

    stream = seen["stream"]
    assert len(stream["steps"]) == 2 * len(models)
    for name, steps in stream["steps"].items():
        assert "".join(steps) == expected[name.partition("/")[0]]
        # One per engine step; a client that falls behind gets several steps in one.
        assert len(steps) <= GREEDY.max_tokens
    assert max(map(len, stream["steps"].values())) > 1
    assert set(stream["reasons"].values()) == {"length"}
    assert [message.partition(":")[0] for message in stream["errors"]] == ["NOT_FOUND"]
    assert "".join(seen["async"]) == expected["rank-8"]


@pytest.mark.slow
async def test_our_protocol_is_part_of_tritons(triton_python: Path) -> None:
    encoded = await run(str(triton_python), str(SUPPORT / "triton_calls.py"), "--descriptors")
    standard = FileDescriptorSet.FromString(base64.b64decode(encoded))
    ours = proto_compat.compile_protocol(package="inference")
    assert proto_compat.breaking_changes(ours, standard, "inference") == []
    assert proto_compat.breaking_changes(standard, ours, "inference"), "the standard has more: the check sees"


async def test_a_client_that_knows_only_reflection_calls_both_protocols(cluster: LocalCluster) -> None:
    expected = (await native(cluster, ["rank-8"]))["rank-8"]
    sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    generate = {"adapter": "rank-8", "text": PROMPT, "sampling": sampling}
    prompt = base64.b64encode(PROMPT.encode()).decode()
    infer = {
        "model_name": "rank-8",
        "id": "7",
        "inputs": [
            {
                "name": "text_input",
                "datatype": "BYTES",
                "shape": [1],
                "contents": {"bytes_contents": [prompt]},
            }
        ],
        "parameters": {
            "temperature": {"double_param": 0},
            "max_tokens": {"int64_param": 12},
            "ignore_eos": {"bool_param": True},
        },
    }
    methods = {
        "loraserve.v1.Inference/Generate": generate,
        "inference.GRPCInferenceService/ModelInfer": infer,
    }
    arguments = [part for path, request in methods.items() for part in (path, json.dumps(request))]
    script = str(SUPPORT / "reflected_calls.py")
    seen = json.loads(await run(sys.executable, script, cluster.address, *arguments))
    assert {"loraserve.v1.Inference", "loraserve.v1.Management", "inference.GRPCInferenceService"} <= set(
        seen["services"]
    )
    steps = seen["answers"]["loraserve.v1.Inference/Generate"]
    assert "".join(step.get("text", "") for step in steps) == expected
    (answer,) = seen["answers"]["inference.GRPCInferenceService/ModelInfer"]
    texts = {output["name"]: output["contents"]["bytes_contents"] for output in answer["outputs"]}
    assert base64.b64decode(texts["text_output"][0]).decode() == expected
    assert answer["id"] == "7"
