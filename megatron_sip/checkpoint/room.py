"""Why a checkpoint's file could not be written: torch hides a full disk behind an ``unexpected pos``."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sip.files import NO_ROOM

_TORCHS_WORDS = ("unexpected pos", "failed writing file")
"""What torch's writer says of every write that was cut short, without the system's reason."""


def num_bytes(buckets: Sequence[Any]) -> int:
    """Of the tensors and blobs of (path, name, (blobs, tensors)); files take a little more."""
    total = 0
    for _, _, (blobs, tensors) in buckets:
        total += sum(tensor.nbytes for _, tensor in tensors)
        total += sum(len(blob.getbuffer()) if isinstance(blob, io.BytesIO) else len(blob) for _, blob in blobs)
    return total


def why_unwritten(error: BaseException, directory: Path, needed_bytes: int, written_bytes: int) -> str:
    """The reason of ``error`` in one line; ``needed_bytes`` were to go to ``directory``, ``written_bytes`` have."""
    line = str(error).strip().partition("\n")[0]
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return line
    without_room = isinstance(error, OSError) and error.errno in NO_ROOM
    if without_room or free < needed_bytes - written_bytes:
        return (
            f"the disk is full: {free:,} bytes are free there, this rank's part takes {needed_bytes:,}; make room, or "
            "give another --save"
        )
    if any(words in line for words in _TORCHS_WORDS):
        return f"{line} (a quota or a limit on files? {free:,} bytes are free there)"
    return line
