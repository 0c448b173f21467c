"""The `max_lora_rank` that each replica starts with, where the plan decides it and not the configuration."""

import msgspec

from loraserve.config import Config
from placement.cluster.resize import Resizer
from placement.engine_sizes import RANK_STEPS
from placement.plans.rank_sizing import RankSizingLimits
from placement.profile import LoadSpeeds


def resizer_of(config: Config, speeds: LoadSpeeds | None = None) -> Resizer:
    """Who decides on restarts; nobody does while settings are fixed. `speeds` are those that a profile says
    adapters come at to a replica that is back.

    A rank that the configuration names keeps a replica, so that adapters of it can be registered at any time,
    and no replica is set above it.
    """
    placement, engine = config.placement, config.engine
    if placement.max_lora_ranks == "fixed":
        return Resizer()
    is_named = "max_lora_rank" not in engine.auto
    limits = RankSizingLimits(
        restart_s=placement.restart_s,
        load_bytes_per_s=(speeds or LoadSpeeds()).origin_bytes_per_s,
        horizon_epochs=placement.restart_horizon_epochs,
        kept=engine.max_lora_rank if is_named else 0,
        highest=engine.max_lora_rank if is_named else RANK_STEPS[-1],
    )
    return Resizer(limits, deadline_s=config.replica.drain_timeout_s)


def with_max_lora_rank(config: Config, max_lora_rank: int | None) -> Config:
    """The configuration of a replica that starts with this setting; None: with its own."""
    if max_lora_rank is None:
        return config
    auto = [name for name in config.engine.auto if name != "max_lora_rank"]
    engine = msgspec.structs.replace(config.engine, max_lora_rank=max_lora_rank, auto=auto)
    return msgspec.structs.replace(config, engine=engine)
