"""The logs of a training run: `metrics.jsonl`, TensorBoard's files and a progress bar."""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["logger", "metrics_log", "progress_bar", "say"]

logger = logging.getLogger("diffjax")


def say(message: str, show: bool) -> None:
    """Logs a message, and prints it if there is a progress bar."""
    logger.info(message)
    if show:
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def metrics_log(
    directory: pathlib.Path | None, start: int, tensorboard: bool
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function `write(step, record)`. It removes the lines of steps that will be run again."""
    if directory is None:
        yield lambda step, record: None
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    _drop_lines_after(path, start)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a", buffering=1))
        writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            writer = stack.enter_context(
                SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
            )

        def write(step: int, record: dict[str, float]) -> None:
            known = {
                name: value if math.isfinite(value) else None for name, value in record.items()
            }
            file.write(json.dumps({"step": step, **known}) + "\n")
            if writer is not None:
                for name, value in record.items():
                    writer.add_scalar(name, value, step)

        yield write


def _drop_lines_after(path: pathlib.Path, start: int) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kept, broken = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        step = _step_of(line)
        if step is None:
            broken.append(str(number))
        elif step <= start:
            kept.append(line + b"\n")
    if broken:
        logger.warning(
            "%s: dropped lines that are not JSON objects with a step: %s", path, ", ".join(broken)
        )
    if (cleaned := b"".join(kept)) != content:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(cleaned)
        os.replace(temporary, path)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None


def progress_bar(start: int, num_steps: int):
    """A bar of tqdm."""
    from tqdm import tqdm

    return tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True)
