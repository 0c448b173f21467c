"""A replica's fabric as its configuration wants it."""

import logging
import resource

from loraserve.config import Config
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import FabricOptions

logger = logging.getLogger(__name__)

SPARE_SHARE = 0.02
SPARE_BYTES = 32 * 1024**2
"""What heads and padding of segments may take beyond the adapters' own bytes, which the pool counts."""

FILES_PER_CACHED = 8
"""Of so many open files that the process may have, one segment is kept: it takes two of them, and the
adapters in use, connections and the engine want theirs."""


def open_fabric(config: Config, host: str) -> Fabric | None:
    """Bring up the transports and what stands on them, on the loop that will use it.

    None where nothing is fetched: no transports are configured, or the engine reads adapters' files itself.
    """
    section = config.fabric
    if not section.transports or config.engine.lora_execution in ("stock", "off"):
        return None
    from loraserve.transport.registry import open_transports

    opened = open_transports(section.transports, host=host)
    return Fabric(
        opened.transports,
        capacity_bytes=int(config.engine.pool_bytes * (1 + SPARE_SHARE)) + SPARE_BYTES,
        options=FabricOptions(
            max_fetches=section.max_fetches,
            inflight_bytes=section.inflight_bytes,
            idle_timeout_s=section.idle_timeout_s,
            max_cached=_max_cached(),
            busy_share=section.busy_share,
        ),
    )


def _max_cached() -> int:
    """How many segments may be kept that nobody uses, of the descriptors that this process may have."""
    most = FabricOptions().max_cached
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else min(most, soft // FILES_PER_CACHED)
