"""A small Llama-architecture checkpoint and PEFT adapters, built on the spot.

Owns what the demo and the tests serve: the ordinary Hugging Face and PEFT layouts on disk, seeded, made with
numpy alone. Knows nothing of engines, clusters or requests.
"""

from loraserve.samples.adapter import LLAMA_MODULES, build_adapter
from loraserve.samples.build import DEFAULT_RANKS, SampleSet, build_samples
from loraserve.samples.checkpoint import build_checkpoint

__all__ = [
    "DEFAULT_RANKS",
    "LLAMA_MODULES",
    "SampleSet",
    "build_adapter",
    "build_checkpoint",
    "build_samples",
]
