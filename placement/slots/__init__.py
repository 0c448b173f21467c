"""Which adapters are active in an engine's slots."""
