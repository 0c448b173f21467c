"""Synthesis of workloads: arrivals, popularity and its drift, lengths, ranks; presets by name.

`workload("loraserve-skew")` gives the columns of a preset, `synthesise(WorkloadSpec(...))` those of a
workload of one's own. The same spec gives the same bits on every machine.
"""

from traces.synthesis.presets import PRESETS, Preset, preset
from traces.synthesis.spec import WorkloadSpec, synthesise
from traces.synthesis.tiling import at_rate, scale_rate, tile
from traces.synthesis.workload import Overrides, is_preset, workload, workload_spec

__all__ = [
    "PRESETS",
    "Overrides",
    "Preset",
    "WorkloadSpec",
    "at_rate",
    "is_preset",
    "preset",
    "scale_rate",
    "synthesise",
    "tile",
    "workload",
    "workload_spec",
]
