"""Pure decisions of the adapter fabric: which source, which transport, what is evicted."""
