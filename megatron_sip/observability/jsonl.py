"""A file of JSON lines, one or more per step, that survives crashes and resumed runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class StepLines:
    """Append-only file of JSON objects, each with an integer ``step``; every line is flushed when it is written."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._stream: TextIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinities become null."""
        if self._stream is None:
            end_last_line(self.path)
            self._stream = self.path.open("a", encoding="utf-8")
        with naming(self.path):
            self._stream.write(json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            self._stream.flush()

    def drop_after(self, step: int) -> int:
        """Remove lines beyond ``step`` and a last line cut off by a crash; returns how many. The file is replaced in
        one move, so that a crash in here loses nothing."""
        self.close()
        if not self.path.exists():
            return 0
        temporary = self.path.with_name(self.path.name + ".tmp")
        dropped = 0
        with self.path.open(encoding="utf-8", errors="replace") as old, temporary.open("w", encoding="utf-8") as new:
            for line in old:
                record = _parse(line)
                if record is not None and record["step"] <= step:
                    new.write(line)
                else:
                    dropped += 1
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        return dropped

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError says that it is about ``path``; those of writes to an open file name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, none if it does not exist; lines cut off by a crash are left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            record = _parse(line)
            if record is not None:
                yield record


def end_last_line(path: Path) -> None:
    """Give a file whose last line was cut off by a crash the missing newline, so that the next line stands alone."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.write(b"\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
