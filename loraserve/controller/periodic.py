"""What the controller does again and again, whatever becomes of it once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def every(period_s: float, name: str, act: Callable[[], Awaitable[object]]) -> None:
    """Act after every pause of so many seconds, for ever. An act that fails is logged, and the next comes: a
    mistake in one epoch must not be the end of all epochs."""
    while True:
        await asyncio.sleep(period_s)
        try:
            await act()
        except Exception:
            logger.exception("%s failed; the next comes in %g s", name, period_s)
