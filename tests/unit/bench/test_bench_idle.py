"""Whether a benchmark sees that others were at work."""

import os
import subprocess
import sys
import time

import pytest

from loraserve.bench.idle import Bystanders

BURN = "while True: pass"


def burn_own_s(seconds: float) -> None:
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        pass


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc/stat: Linux only")
def test_the_work_of_others_is_seen_and_our_own_is_not() -> None:
    with subprocess.Popen([sys.executable, "-c", BURN]) as other:
        try:
            everyone, ours = Bystanders(()), Bystanders((other.pid,))
            burn_own_s(0.5)
            seen, left = everyone.share(), ours.share()
        finally:
            other.kill()
    assert seen is not None
    assert left is not None
    # What the rest of the machine does is in both.
    assert seen > left


def test_a_process_that_has_ended_leaves_it_unknown() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        bystanders = Bystanders((other.pid,))
        other.communicate(b"\n")
    assert bystanders.share() is None
