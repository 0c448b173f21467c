"""Replay of a trace through a router, open loop: arrivals keep the trace's clock whatever comes back."""
