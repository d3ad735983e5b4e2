"""Experiments: one script or package for each result, with a frozen dataclass of settings."""
