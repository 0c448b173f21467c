"""Workloads of LoRAServe: trace formats, adapter and rank assignment, pacing, metrics, reports."""

__version__ = "0.1.0"
