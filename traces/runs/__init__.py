"""Figures from runs of steps: the same as from records, without a sample per token."""
