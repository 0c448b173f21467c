"""Profiles of replicas: measured by `loraserve profile`, fitted, written to and read from files.

Owns what is measured and how it is fitted. Knows nothing of clusters, and of the engines only their protocol.
"""
