"""The engine that is profiled, and the time in which it is."""

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from loraserve.clock import Clock, WallClock
from loraserve.config import Config
from loraserve.engines.base import Engine
from loraserve.engines.virtual import VirtualTime
from loraserve.profiling.load import Sleep

# Every prompt is computed, and what shows the run's progress has the terminal to itself.
_VLLM_EXTRA: dict[str, Any] = {"enable_prefix_caching": False, "use_tqdm_on_load": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """An engine not started yet, its clock and sleep; `virtual` drives both if time is not real, after the
    engine has started."""

    engine: Engine
    clock: Clock
    sleep: Sleep
    virtual: VirtualTime | None = None


def open_stage(config: Config, model: str) -> Stage:
    """The configured engine over this model; the emulated one in virtual time."""
    section = msgspec.structs.replace(config.model, path=model)
    if config.engine.kind == "emulated":
        from loraserve.engines.emulated import EmulatedEngine

        time = VirtualTime()
        engine = EmulatedEngine(config.engine, config.emulated, section, clock=time, sleep=time.sleep)
        return Stage(engine=engine, clock=time, sleep=time.sleep, virtual=time)
    from loraserve.engines.factory import make_engine

    extra = _VLLM_EXTRA | config.engine.extra
    configured = msgspec.structs.replace(
        config, model=section, engine=msgspec.structs.replace(config.engine, extra=extra)
    )
    return Stage(engine=make_engine(configured), clock=WallClock(), sleep=asyncio.sleep)
