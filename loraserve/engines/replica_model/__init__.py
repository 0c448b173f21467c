"""One replica's continuous batching without a model in it, in exact whole picoseconds."""
