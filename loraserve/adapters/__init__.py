"""Reads, checks and stores LoRA adapters in the PEFT layout.

Owns what an adapter is on disk and why one is refused. Knows nothing of clusters, engines or requests.
"""

from loraserve.adapters.base import BaseModel, read_base
from loraserve.adapters.manifest import AdapterManifest, inspect_adapter
from loraserve.adapters.names import parse_name
from loraserve.adapters.sources import (
    HubClient,
    HubSource,
    LocalSource,
    UrlSource,
    parse_source,
    resolve_source,
)
from loraserve.adapters.store import AdapterStore, StoredAdapter, StoreLimits

__all__ = [
    "AdapterManifest",
    "AdapterStore",
    "BaseModel",
    "HubClient",
    "HubSource",
    "LocalSource",
    "StoreLimits",
    "StoredAdapter",
    "UrlSource",
    "inspect_adapter",
    "parse_name",
    "parse_source",
    "read_base",
    "resolve_source",
]
