"""LoRAServe: rank-aware placement, routing and serving of many LoRA adapters over vLLM replicas."""

__version__ = "0.1.0"
