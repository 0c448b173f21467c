"""What an adapter is taken to be worth before a window has seen all of it."""

from collections.abc import Collection, Iterable, Mapping
from math import fsum

from placement.types import AdapterVersion, VersionId


def with_newcomers(
    forecast: Mapping[VersionId, float], adapters: Iterable[AdapterVersion], new: Collection[VersionId]
) -> dict[VersionId, float]:
    """The forecast of what is registered, `adapters`, with a prior for those of `new`.

    The prior is the mean over the others of its rank, those without demand included, so that many
    registrations do not make up demand; over all others where its rank has none. A newcomer of whom more
    has been forecast keeps that; what is not registered any more goes.
    """
    known: dict[int, list[float]] = {}
    registered = sorted(adapters, key=lambda adapter: adapter.version_id)
    for adapter in registered:
        if adapter.version_id not in new:
            known.setdefault(adapter.rank, []).append(forecast.get(adapter.version_id, 0.0))
    means = {rank: fsum(rates) / len(rates) for rank, rates in known.items()}
    num_known = sum(map(len, known.values()))
    of_all = fsum(rate for rates in known.values() for rate in rates) / num_known if num_known else 0.0
    found = {}
    for adapter in registered:
        version = adapter.version_id
        rate = forecast.get(version, 0.0)
        if version in new:
            rate = max(rate, means.get(adapter.rank, of_all))
        if rate > 0:
            found[version] = rate
    return found
