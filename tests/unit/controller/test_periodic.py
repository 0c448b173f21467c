"""What comes again and again, over failures and until it is cancelled."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import pytest

from loraserve.controller.controller import Controller
from loraserve.controller.periodic import every
from placement.cluster import messages
from tests.support.controller_kit import TIMEOUT_S, Setup


async def test_an_act_that_fails_is_told_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    num_acts, is_enough = 0, asyncio.Event()

    async def act() -> None:
        nonlocal num_acts
        num_acts += 1
        if num_acts < 3:
            raise RuntimeError("a mistake")
        is_enough.set()

    with caplog.at_level(logging.ERROR):
        running = asyncio.ensure_future(every(0.001, "an act", act))
        async with asyncio.timeout(TIMEOUT_S):
            await is_enough.wait()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert running.cancelled()
    assert sum("an act failed" in line for line in caplog.messages) == 2


async def test_epochs_go_on_after_one_that_failed(setup: Callable[..., Setup]) -> None:
    one = setup(placement={"epoch_s": 0.02})
    seen: list[messages.Event | messages.Command] = []

    def fail_once(step: messages.Event | messages.Command, stage: str) -> None:
        if isinstance(step, messages.EpochElapsed) and stage == "before":
            seen.append(step)
            if len(seen) == 1:
                raise RuntimeError("a mistake")

    one.on_step = fail_once
    one.controller = one.make()
    controller: Controller = await one.start()
    await controller.wait_until(lambda: len(seen) >= 3, TIMEOUT_S)
