"""What a checkpoint says of itself: the shape, dtype and checksum of every array, and a version.

It is written in the background once the checksums are computed, read before any array, and compared
with what is to be restored.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals as InBackground

from ._fingerprint import describe, text
from ._processes import is_main

__all__ = ["ManifestSave", "check_same", "read_manifest"]

_FORMAT = 2


def _x64() -> bool:
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


class _Handler(ocp.JsonCheckpointHandler):
    """Orbax's handler of JSON, for a value that is not known yet when the save begins."""

    async def async_save(
        self, directory: epath.Path, item: Any = None, args: Any = None
    ) -> list[ocp.Future]:
        return [InBackground(_write(directory, args), name="manifest")]


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """What Orbax's manager takes to write a manifest."""

    checksums: Callable[[], dict[str, list]]
    """What waits for the result of `fingerprint`, in the background."""
    data: Any
    """What `save` was given beside the arrays."""
    x64: bool = dataclasses.field(default_factory=_x64)
    """The thread that saves may have a setting of its own."""


async def _write(directory: epath.Path, args: Any) -> None:
    manifest = {"format": _FORMAT, "arrays": args.checksums(), "data": args.data}
    manifest["x64"] = args.x64
    manifest["checksum"] = zlib.crc32(json.dumps(manifest).encode())
    if is_main():
        (directory / "metadata").write_text(json.dumps(manifest))


def read_manifest(path: pathlib.Path) -> dict:
    """The manifest of a checkpoint."""
    manifest = json.loads((path / "manifest" / "metadata").read_text())
    checksum = manifest.pop("checksum")
    if zlib.crc32(json.dumps(manifest).encode()) != checksum:
        raise ValueError("the checksum of the manifest differs")
    return manifest


def check_same(
    path: pathlib.Path, manifest: dict, leaves: dict[str, Any], part: str | None
) -> None:
    """Raises an error that lists what differs from the leaves to restore, or from their part."""
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"the checkpoint {path}: expected format {_FORMAT}, got {manifest.get('format', 1)}; "
            f"another version of diffjax wrote it"
        )
    described = manifest["arrays"]
    if part is not None:
        within = {x: y for x, y in described.items() if x == part or x.startswith(f"{part}.")}
        if not within:
            parts = sorted({name.partition(".")[0] for name in described})
            raise ValueError(f"part: expected one of {parts}, got {part!r}")
        described = within
    saved = {name: text(*found[:2]) for name, found in described.items()}
    expected = {name: text(*describe(leaf)) for name, leaf in leaves.items()}
    differ = [
        f"  {name}: expected {expected.get(name, 'none')}, "
        f"the checkpoint has {saved.get(name, 'none')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if not differ:
        return
    lines = [f"the checkpoint {path} is of another architecture:", *differ[:40]]
    if len(differ) > 40:
        lines.append(f"  and {len(differ) - 40} more")
    fields = sorted({name.partition(".")[0] for name in saved})
    holds = [field for field in fields if all(f"{field}.{name}" in saved for name in expected)]
    if part is None and holds:
        lines.append(f'  to read a part of it: restore(..., part="{holds[0]}")')
    if manifest["x64"] != _x64():
        lines.append(f"  jax_enable_x64 was {manifest['x64']} when it was saved, and is {_x64()}")
    raise ValueError("\n".join(lines))
