"""Measurements of the library's own cost: `python -m benchmarks.overhead`."""
