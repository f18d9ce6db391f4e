"""Benchmarks: one file per op, `pytest benchmarks/`, or `python -m benchmarks` for a record.

Our backends are timed against the published program and against peers (`peers.py`) in one
round robin, after it has been asserted that all of them compute the same thing.
"""
