"""The record of an experiment or benchmark, and a page that explains its scores.

`write_record` writes JSON with the settings, the machine, the date, the versions, the seconds and
the scores. `write_report` writes `report.md`: what each score means, the tables, and the figures.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax

import diffjax

PACKAGES = ("jax", "flax", "diffrax", "optax")


def write_record(
    path: pathlib.Path, settings: Any, scores: Any, seconds: float, packages: Iterable[str] = ()
) -> dict:
    """Writes a result as JSON and returns it.

    JSON has no NaN and no infinity: such a number becomes null.

    Args:
        path: the file.
        settings: a dataclass.
        scores: dicts, lists, numbers and strings.
        seconds: the time of the whole run.
        packages: further packages whose versions are recorded.
    """
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)}
    record = {
        "settings": dataclasses.asdict(settings),
        "machine": {"device": jax.devices()[0].device_kind, "cpu": cpu_name(), "cores": cores()},
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "diffjax": diffjax.__version__,
            **versions,
        },
        "seconds": seconds,
        "scores": scores,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False, default=str) + "\n")
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Score(NamedTuple):
    """What a score means."""

    meaning: str
    """a sentence or two"""
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    """None for a number that others are compared with"""


def write_report(
    folder: pathlib.Path,
    title: str,
    record: dict,
    scores: Mapping[str, Score],
    tables: Mapping[str, str],
    figures: Mapping[str, str],
) -> None:
    """Writes `report.md` and prints the tables.

    Args:
        folder: the folder of the page and of the figures.
        title: the title of the page.
        record: what `write_record` returned.
        scores: the meaning of each score, by its name in the tables.
        tables: Markdown tables by heading.
        figures: captions by file name.
    """
    machine, versions = record["machine"], record["versions"]
    cpu = f"{machine['cores']} cores of {machine['cpu']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"# {title}",
        f"{record['date']}, {cpu}, device {machine['device']}.",
        f"{packages}. {record['seconds']:.0f} s.",
    ]
    for heading, text in tables.items():
        lines += [f"## {heading}", text]
    lines += ["## What the scores mean"]
    lines += ["\n".join(_explained(name, score) for name, score in scores.items())]
    lines += ["## Figures"] * bool(figures)
    lines += [f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items()]
    (folder / "report.md").write_text("\n\n".join(lines) + "\n")
    print("\n\n".join(f"{heading}\n\n{text}" for heading, text in tables.items()))
    print(f"report: {folder / 'report.md'}", flush=True)


def _explained(name: str, score: Score) -> str:
    unit = f" ({score.unit})" if score.unit else ""
    better = f" {score.better.capitalize()} is better." if score.better else ""
    return f"- **{name}**{unit}: {score.meaning}{better}"


def table(columns: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = [str(column) for column in columns]
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
