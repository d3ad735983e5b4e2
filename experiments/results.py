"""Results as strict JSON, for the experiments and the benchmarks."""

import json
import math
import pathlib
from typing import Any


def write_results(path: pathlib.Path, results: Any) -> None:
    """Writes JSON. It has no NaN and no infinity: such a number becomes null."""
    path.write_text(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
