"""What loading an adapter leaves to the engine: memory for prepared forms, and threads for decode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraserve.adapters.segment import AdapterSegment, build_segment
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm_pool import EnginePool
from placement.types import VersionId
from tests.support.adapter_maker import AdapterMaker
from tests.support.fake_workers import FakeRank, FakeWorkers

NAMES = ("one@0", "two@0", "three@0")


class PreparingRank(FakeRank):
    """A rank that knows, as the real one, which adapters it holds in their prepared form."""

    def __init__(self) -> None:
        super().__init__(num_slots=1)
        self.prepared: set[int] = set()

    def loraserve_advance(self, lora_id: int, activate: bool, is_busy: bool) -> tuple[str, str]:
        """Checking prepares."""
        self.prepared.add(lora_id)
        return super().loraserve_advance(lora_id, activate, is_busy)

    def loraserve_deactivate(self, lora_id: int) -> None:
        """The prepared form goes with the slot."""
        self.prepared.discard(lora_id)
        super().loraserve_deactivate(lora_id)


def refuses(_: int) -> Any:
    raise KeyError("something inside vLLM")


@pytest.mark.parametrize("fault", [{}, {"loraserve_deactivate": refuses}], ids=["sound", "failing"])
async def test_only_what_has_a_slot_stays_prepared(tmp_path: Path, fault: dict[str, Any]) -> None:
    """A freeing that fails costs memory and no load."""
    ranks = [PreparingRank(), PreparingRank()]
    workers = FakeWorkers(num_ranks=2, num_slots=1)
    workers.ranks[:] = ranks
    pool = EnginePool(workers, num_slots=1, num_adapters=3, max_lora_rank=8, num_requests=lambda: 0)
    folder = AdapterMaker(tmp_path)()
    ranks[0].faults |= fault
    for name in NAMES:
        await pool.load(AdapterFiles(version_id=VersionId(name), directory=folder, rank=4, size_bytes=1))
    assert await pool.resident() == {VersionId(name) for name in NAMES}
    if not fault:
        assert [(rank.active, rank.prepared) for rank in ranks] == [({1}, {1})] * 2
    pool.close()
    workers.end()


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[AdapterSegment]:
    """An adapter in shared memory."""
    one = build_segment(AdapterMaker(tmp_path)(), name="one", digest=None, max_lora_rank=8)
    yield one
    one.close()


def test_preparing_takes_no_threads_whatever_torch_was_told_before(segment: AdapterSegment) -> None:
    import torch

    from loraserve.engines.vllm_lora.pool import WorkerPool

    def prepare(_: Any, rest: Any) -> dict[str, Any]:
        torch.zeros(2000, 2000).mul_(2).t().contiguous()
        return {"threads": torch.get_num_threads()}

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pool = WorkerPool(prepare)
        pool.open(1, segment.ref)
        assert pool.prepared(1) == {"threads": 1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
