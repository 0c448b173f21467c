"""Bodies in device memory over UCX: two processes on one GPU, which UCX joins by CUDA IPC."""

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SIZES_MIB = (1, 16, 256)
REPEATS = 7
PEER = """
import sys, torch
from loraserve.transport.base import Region
from loraserve.transport.listener import Listener
from loraserve.transport.ucx import open_ucx
from tests.gpu.test_fabric_on_gpu import body
transport = open_ucx(Listener("127.0.0.1"))
for size_mib in map(int, sys.argv[1:]):
    held = body(size_mib)
    torch.cuda.synchronize()
    transport.publish(f"k{size_mib}", Region(head=b"h", body=held, size_bytes=held.numel(), owner=held))
print(transport.address.decode(), flush=True)
sys.stdin.read()
transport.close()
"""


@pytest.fixture(autouse=True)
def ucx() -> None:
    if importlib.util.find_spec("ucxx") is None:
        pytest.skip("needs ucxx: ./scripts/setup --cuda installs it")


def body(size_mib: int) -> Any:
    """A tensor of bytes on the GPU, the same in every process."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(size_mib)
    return torch.randint(0, 256, (size_mib * 1024**2,), dtype=torch.uint8, generator=generator).cuda()


@contextmanager
def peer() -> Iterator[bytes]:
    """A second process that publishes bodies of all sizes, and its address."""
    command = [sys.executable, "-c", PEER, *map(str, SIZES_MIB)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().encode()
        finally:
            process.kill()


def test_device_memory_is_fetched_into_device_memory(record_property: Callable[[str, object], None]) -> None:
    import torch

    from loraserve.transport.listener import Listener
    from loraserve.transport.ucx import open_ucx

    transport = open_ucx(Listener("127.0.0.1"))
    try:
        with peer() as address:
            for size_mib in SIZES_MIB:
                into = torch.zeros(size_mib * 1024**2, dtype=torch.uint8, device="cuda")
                torch.cuda.synchronize()  # UCX copies on a stream of its own
                seconds = []
                for _ in range(REPEATS):
                    begun_s = time.perf_counter()
                    transport.fetch(
                        address,
                        f"k{size_mib}",
                        into,
                        on_bytes=lambda begin, end: None,
                        idle_timeout_s=30.0,
                        stop=lambda: False,
                    )
                    seconds.append(time.perf_counter() - begun_s)
                assert torch.equal(into, body(size_mib))
                gib_per_s = size_mib / 1024 / statistics.median(seconds[1:])
                record_property(f"ucx_device_{size_mib}_mib_gib_per_s", round(gib_per_s, 2))
                print(f"{torch.cuda.get_device_name()}: {size_mib} MiB at {gib_per_s:.2f} GiB/s")
    finally:
        transport.close()
    assert transport.active_bytes() == 0


def test_device_memory_reaches_host_memory_and_back() -> None:
    import torch

    from loraserve.transport.base import Region
    from loraserve.transport.listener import Listener
    from loraserve.transport.ucx import open_ucx

    transport = open_ucx(Listener("127.0.0.1"))
    try:
        with peer() as address:
            on_host = bytearray(16 * 1024**2)
            transport.fetch(
                address, "k16", on_host, on_bytes=lambda b, e: None, idle_timeout_s=30.0, stop=lambda: False
            )
            assert bytes(on_host) == body(16).cpu().numpy().tobytes()
        transport.publish("h", Region(head=b"h", body=bytes(on_host), size_bytes=len(on_host)))
        into = torch.zeros(len(on_host), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        transport.fetch(
            transport.address,
            "h",
            into,
            on_bytes=lambda b, e: None,
            idle_timeout_s=30.0,
            stop=lambda: False,
        )
        assert torch.equal(into, body(16))
    finally:
        transport.close()
