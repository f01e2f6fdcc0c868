"""Checkpoints as directories: names, the manifest that makes one whole, publishing, pruning.

A save writes into ``iter_0000020.partial-<token>`` and, once every file is on disk and listed with its size in the
manifest, renames it to ``iter_0000020``; only then does ``latest_checkpointed_iteration.txt`` name it. Whatever kills
a save therefore leaves the earlier checkpoints and the name of the latest one alone. The token keeps a writer that
outlives its run from writing into the directory of the run that follows.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sip.errors import CheckpointError

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
RELEASE = "release"
"""What Megatron-LM writes into the latest file, and calls the directory, for weights without an iteration."""

_STEP = re.compile(r"iter_(\d{7,})")
_LEFTOVER = re.compile(r"iter_\d{7,}\.(partial|replaced)-\w+")
_DCP_METADATA = ".metadata"
_MCORE_METADATA = "metadata.json"


@dataclass(frozen=True)
class Manifest:
    """The last file of a checkpoint: what makes it whole."""

    step: int
    files: Mapping[str, int]
    """File name -> size in bytes, of every other file."""
    about: Mapping[str, Any]
    """For people and tools: versions, layout, model."""
    format_version: int = FORMAT_VERSION


def step_directory(root: Path, step: int) -> Path:
    """Where a whole checkpoint of ``step`` lies, under Megatron-LM's name."""
    return root / f"iter_{step:07d}"


def partial_directory(root: Path, step: int, token: str) -> Path:
    """Where a save of ``step`` writes until it is whole."""
    return root / f"iter_{step:07d}.partial-{token}"


def write_manifest(directory: Path, step: int, about: Mapping[str, Any]) -> None:
    """Lists the files of ``directory`` with their sizes, durably: after it the checkpoint is whole."""
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    manifest = Manifest(step=step, files=files, about=dict(about))
    write_durably(directory / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
    sync_directory(directory)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a checkpoint, or None for one that another program wrote.

    Raises:
        CheckpointError: the manifest is broken, or of a later format.
    """
    path = directory / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's manifest ({error}): load another step.") from error
    if manifest.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format {manifest.format_version}, this program reads up to {FORMAT_VERSION}: "
            "use a newer one."
        )
    return manifest


def damage(directory: Path) -> str | None:
    """What keeps ``directory`` from being a whole checkpoint, or None.

    Looks at names and sizes, not at contents. A checkpoint without our manifest (Megatron-LM's) is taken for whole if
    it has its two metadata files, which Megatron-Core writes last.
    """
    if not directory.is_dir():
        return f"{directory} does not exist"
    for name in (_MCORE_METADATA, _DCP_METADATA):
        if not (directory / name).is_file():
            return f"{directory} has no {name}: a half-written save, or not a torch_dist checkpoint"
    manifest = read_manifest(directory)
    for name, size in (manifest.files if manifest else {}).items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
    return None


def saved_steps(root: Path) -> list[int]:
    """Steps that have a directory under ``root``, ascending, whole or not."""
    if not root.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(int(match[1]) for match, path in matches if match and path.is_dir())


def whole_steps(root: Path) -> list[int]:
    """Steps with a whole checkpoint under ``root``, ascending."""
    return [step for step in saved_steps(root) if _is_whole(step_directory(root, step))]


def read_latest(root: Path) -> int | str | None:
    """The step that the latest file names, ``RELEASE``, or None without such a file.

    Raises:
        CheckpointError: the file holds something else.
    """
    path = root / LATEST
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if text == RELEASE:
        return RELEASE
    if not text.isdigit():
        raise CheckpointError(f"{path} says {text[:40]!r}, which is no step: {_choose(root)}.")
    return int(text)


def resolve(root: Path, step: int | None) -> Path | None:
    """The whole checkpoint of ``step`` under ``root``, or the latest; None if ``root`` holds none at all.

    Raises:
        CheckpointError: the one wanted is missing or damaged; the message names the whole ones.
    """
    if step is None:
        latest = read_latest(root)
        if latest is None:
            if (root / _MCORE_METADATA).is_file():
                return root  # the path of one checkpoint, in place of the directory that holds them
            if saved_steps(root):
                raise CheckpointError(f"{root} has checkpoints but no {LATEST}: {_choose(root)}.")
            return None
        directory = root / RELEASE if latest == RELEASE else step_directory(root, int(latest))
    else:
        directory = step_directory(root, step)
    problem = damage(directory)
    if problem:
        raise CheckpointError(f"{problem}: {_choose(root)}.")
    return directory


def publish(partial: Path, final: Path) -> None:
    """Gives a whole checkpoint its name, in place of an earlier one of the same step, and makes it the latest."""
    replaced = final.with_name(final.name + ".replaced-" + partial.name.rpartition("-")[2])
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_directory(final.parent)
    match = _STEP.fullmatch(final.name)
    assert match, final
    write_durably(final.parent / LATEST, f"{int(match[1])}\n")
    sync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def remove_leftovers(root: Path) -> None:
    """Deletes what saves that never finished have left. To be called while no save is under way."""
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir():
            logger.warning("removing %s, the leftover of a save that did not finish", path)
            shutil.rmtree(path)


def carry(folder: Path, root: Path) -> None:
    """Copies ``folder``, if there is one, into ``root``, unless that has one of its name: what stands beside the
    checkpoint that a run started from goes with what it saves."""
    copy, partial = root / folder.name, root / f"{folder.name}.partial"
    if folder.is_dir() and not copy.exists():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed meanwhile
        shutil.copytree(folder, partial)
        os.replace(partial, copy)


def prune(root: Path, newest: int, keep: int) -> list[int]:
    """Keeps the ``keep`` latest whole checkpoints of ours up to ``newest``; returns the steps it deleted.

    Later steps (of a run that was taken up again at an earlier one) and checkpoints of other programs stay.
    """
    ours = [step for step in whole_steps(root) if step <= newest and read_manifest(step_directory(root, step))]
    doomed = ours[:-keep]
    for step in doomed:
        directory = step_directory(root, step)
        # First what every whole checkpoint has: a deletion cut short must not leave what looks like one.
        (directory / _MCORE_METADATA).unlink()
        shutil.rmtree(directory)
    return doomed


def write_durably(path: Path, text: str) -> None:
    """Replaces ``path`` at one stroke: a reader sees the old text or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_file(path: Path) -> None:
    """Waits until the contents of ``path`` are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Waits until the names in ``directory`` are on disk."""
    sync_file(directory)


def _is_whole(directory: Path) -> bool:
    try:
        return damage(directory) is None
    except CheckpointError:
        return False


def _choose(root: Path) -> str:
    steps = whole_steps(root)
    if not steps:
        return f"{root} holds no whole checkpoint"
    shown = ", ".join(str(step) for step in steps[-5:])
    return f"whole checkpoints there: {shown}; load one with --ckpt-step {steps[-1]}"
