"""Capacity: the fewest replicas that hold an SLO, what they cost, and how sure that is.

`slo` is the target, `mixes` which `max_lora_rank` each replica has, `trials` one simulation, `study` which of
them are run, `answers` what follows from their figures, `plots` and `page` show it.
"""
