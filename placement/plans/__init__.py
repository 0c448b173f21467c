"""Plans as values: what differs, what is refused, what was before, and what settings they name."""
