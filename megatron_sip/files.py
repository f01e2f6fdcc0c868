"""Results on disk: a file is whole or is what it was before, and what cannot be written is said with its path."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from megatron_sip.errors import DataError

PARTIAL = ".partial"
"""Behind the name of a file while it is written."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def cannot_write(path: Path, error: OSError) -> DataError:
    """What to say of an output that cannot be made."""
    remedy = "make room there" if error.errno in NO_ROOM else "get the right to write there"
    return DataError(f"{path} cannot be written ({error.strerror}): choose another place, or {remedy}")


def make_folder(path: Path) -> None:
    """A folder to write to. Raises ``DataError`` if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    if not os.access(path, os.W_OK):
        raise cannot_write(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def require_folder_of(path: Path, flag: str) -> None:
    """Before the work for a file that the user names: a typo makes no folders. Raises ``DataError``."""
    if not path.parent.is_dir():
        raise DataError(f"{flag} {path}: there is no folder {path.parent}; make it first, or correct the path")
    if path.is_dir():
        raise DataError(f"{flag} {path} is a folder: name a file in it")


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file whole, or leave what is there; a pipe or a device gets the text as it is.

    ``errors``: of the encoding to UTF-8, as ``str.encode`` has it. Raises ``DataError``.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """Likewise."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None
