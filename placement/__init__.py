"""Pure decisions of LoRAServe: where adapters live and where a request goes. No I/O, no clocks."""

__version__ = "0.1.0"
