"""Experiments: what policies do on traces, at rates and in numbers of replicas, from a file to a report.

`spec` is the file, `jobs` the single pieces of work in it, `measure` what one of them does, `run` does them
all side by side and goes on where an earlier run was ended, `results` is what comes of it.
"""
