"""How the start of a replica fails when Ray itself does."""

from pathlib import Path

import pytest
import ray

from loraserve.cluster.fleet import RayFleet
from loraserve.config import Config
from loraserve.errors import ReplicaStartError
from placement.types import ReplicaId


async def test_an_error_of_ray_is_a_start_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process is not connected to Ray, and Ray is not to start a cluster because of that.
    monkeypatch.setattr("ray._private.auto_init_hook.enable_auto_connect", False)
    assert not ray.is_initialized()
    config = Config()
    fleet = RayFleet(config, str(tmp_path))
    with pytest.raises(ReplicaStartError, match=r"^replica replica-0 did not start: Ray\w+: .") as failed:
        await fleet.start(ReplicaId("replica-0"), config)
    assert "\n" not in str(failed.value)
