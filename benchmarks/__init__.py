"""Measurements of the library's cost: `python -m benchmarks.overhead`."""
