"""A replica's fabric in the words that the controller knows."""

import os

from loraserve.engines.description import FabricPlace, FabricTotals, Fetched
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import Acquired


def place_of(fabric: Fabric | None) -> FabricPlace:
    """Where its adapters can be fetched from, and what it caches."""
    if fabric is None:
        return FabricPlace()
    return FabricPlace(host=os.uname().nodename, addresses=fabric.addresses, cached=fabric.cached())


def totals_of(fabric: Fabric | None) -> FabricTotals:
    """What it has done so far."""
    if fabric is None:
        return FabricTotals()
    counts = fabric.counts()
    return FabricTotals(
        loads=counts.loads,
        bytes=counts.bytes,
        seconds=counts.seconds,
        failures=counts.failures,
        held_bytes=counts.held_bytes,
        cached_bytes=counts.cached_bytes,
        cached=fabric.cached(),
        open_breakers=tuple(sorted(name for name, state in counts.breakers.items() if state == "open")),
    )


def fetched_of(acquired: Acquired) -> Fetched:
    """Where a load's bytes came from."""
    return Fetched(
        source=acquired.scheme or acquired.source,
        peer=acquired.peer,
        size_bytes=acquired.size_bytes,
        transfer_s=acquired.seconds.body_s,
    )
