"""Engines behind one protocol: real vLLM, and an emulated one with no model in it."""
