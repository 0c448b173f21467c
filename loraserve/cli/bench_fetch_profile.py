"""What `bench fetch` has measured, written into a profile, which the planner and the simulator read."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraserve.bench.fetch_figures import PEERS, FetchRow
from loraserve.errors import BadInputError
from loraserve.profiling.files import read_profile, write_profile


def check_profile(path: Path) -> None:
    """Before the run: BadInputError for what is no profile or cannot be written again."""
    read_profile(path)
    if not os.access(path.parent, os.W_OK):
        raise BadInputError(f"--profile: {path}: its folder cannot be written")


def keep_speeds(path: Path, rows: Sequence[FetchRow]) -> tuple[float | None, float | None]:
    """Write the bytes per second of the largest adapter into the profile: from the faster kind of peer, and
    from the store. Returns both; None for what was not measured, which stays as it was."""
    profile = read_profile(path)
    peer, origin = _fastest(rows, PEERS), _fastest(rows, ("origin",))
    speeds, origins = profile.speeds, dict(profile.origins)
    if peer is not None:
        speeds = replace(speeds, peer_bytes_per_s=peer.bytes_per_s)
        origins["speeds.peer_bytes_per_s"] = _said(peer, "peer process of the same machine")
    if origin is not None:
        speeds = replace(speeds, origin_bytes_per_s=origin.bytes_per_s)
        origins["speeds.origin_bytes_per_s"] = _said(origin, "store on the same machine")
    write_profile(path, replace(profile, speeds=speeds, origins=origins))
    return (
        None if peer is None else peer.bytes_per_s,
        None if origin is None else origin.bytes_per_s,
    )


def _fastest(rows: Sequence[FetchRow], sources: Sequence[str]) -> FetchRow | None:
    """Of the largest adapter, whichever of these sources was the faster."""
    found = [row for row in rows if row.source in sources]
    return max(found, key=lambda row: (row.size_bytes, row.bytes_per_s), default=None)


def _said(row: FetchRow, source: str) -> str:
    how = f" over {row.source}" if row.source in PEERS else ""
    return f"measured by loraserve bench fetch: {row.label} from a {source}{how}, until resident"
