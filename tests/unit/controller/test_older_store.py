"""A cluster's folder from before the fabric: what is missing there is made, and nobody waits for it."""

import threading
from collections.abc import Callable

import pytest

from loraserve.adapters import AdapterStore
from loraserve.samples import SampleSet
from placement.types import ReplicaId
from tests.support.controller_kit import TIMEOUT_S, Setup


async def test_entries_without_a_head_get_one_beside_the_loop_when_they_are_loaded(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup(with_fabric=True, cluster={"replicas": 2}, fabric={"transports": ["tcp"]})
    controller = await made.start()
    version = await controller.register("rank-8", str(samples.adapters["rank-8"]), replace=False)
    sha256 = controller.state.adapters[version].sha256
    head_file = controller.library.directory_of(sha256) / "segment.head"
    before = head_file.read_bytes()
    await made.controller.stop()
    for replica in list(made.fleet.links):
        await made.fleet.kill(ReplicaId(replica))
    head_file.unlink()
    in_threads: list[bool] = []
    segment_head = AdapterStore.segment_head

    def watched(self: AdapterStore, sha256: str, name: str) -> bytes:
        in_threads.append(threading.current_thread() is not threading.main_thread())
        return segment_head(self, sha256, name)

    monkeypatch.setattr(AdapterStore, "segment_head", watched)
    made.controller = made.make()
    controller = await made.start()
    await controller.wait_until(lambda: len(controller.state.holders(version)) == 2, TIMEOUT_S)
    assert head_file.read_bytes() == before
    assert in_threads == [True], "once, and never on the loop"
    fabrics = [link.server.fabric for link in made.fleet.links.values() if link.server.fabric is not None]
    assert sum(fabric.counts().loads.get("origin", 0) for fabric in fabrics) == 1
