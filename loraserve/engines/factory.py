"""Engines by the name that the configuration gives them; each is imported only when it is made."""

from loraserve.clock import WallClock
from loraserve.config import Config
from loraserve.engines.base import Engine


def make_engine(config: Config) -> Engine:
    """The engine that `[engine] kind` names, not started yet."""
    match config.engine.kind:
        case "vllm":
            from loraserve.engines.vllm import VllmEngine

            return VllmEngine(config.model, config.engine)
        case "emulated":
            from loraserve.engines.emulated import EmulatedEngine

            return EmulatedEngine(config.engine, config.emulated, config.model, clock=WallClock())
