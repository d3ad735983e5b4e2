"""Experiments: one script a result, its settings a frozen dataclass at the top."""
