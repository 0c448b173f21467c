"""Measures what things cost on this machine and in this engine: `loraserve bench`.

Owns what is measured, how it is timed, and what figures are made of it. Knows nothing of clusters, and of the
engines only their protocol.
"""
