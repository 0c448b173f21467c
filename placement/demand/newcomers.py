"""What an adapter is taken to be worth before a window has seen all of it."""

from collections.abc import Collection, Mapping
from math import fsum

from placement.types import AdapterVersion, VersionId


def with_newcomers(
    forecast: Mapping[VersionId, float], adapters: Collection[AdapterVersion], new: Collection[VersionId]
) -> dict[VersionId, float]:
    """The forecast of what is registered, `adapters`, with a prior for those of `new`.

    The prior is the mean over the others of its rank, those without demand included, so that many
    registrations do not make up demand; over all others where its rank has none. A newcomer of whom more
    has been forecast keeps that; what is not registered any more goes.
    """
    priors = _priors(forecast, adapters, new) if new else {}
    found = {}
    for adapter in adapters:
        rate = forecast.get(adapter.version_id, 0.0)
        if adapter.version_id in new:
            rate = max(rate, priors.get(adapter.rank, priors[None]))
        if rate > 0:
            found[adapter.version_id] = rate
    return found


def _priors(
    forecast: Mapping[VersionId, float], adapters: Collection[AdapterVersion], new: Collection[VersionId]
) -> dict[int | None, float]:
    """The mean of each rank, and under None of all; `fsum` makes it the same in whatever order."""
    known: dict[int | None, list[float]] = {}
    for adapter in adapters:
        if adapter.version_id not in new:
            known.setdefault(adapter.rank, []).append(forecast.get(adapter.version_id, 0.0))
    known[None] = [rate for rates in known.values() for rate in rates]
    return {rank: fsum(rates) / len(rates) if rates else 0.0 for rank, rates in known.items()}
