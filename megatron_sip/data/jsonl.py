"""Lines of jsonl files (plain, .gz, .zst) in batches that know where they stand."""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_sip.errors import ConfigurationError, DataError

_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class LineBatch:
    """Whole lines of one file, undecoded, and how far reading has come."""

    path: str
    first_line: int
    """Number of the first line, from 1."""
    lines: tuple[bytes, ...]
    num_bytes_read: int
    """Bytes of input files consumed so far, as stored: for the ETA."""


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of paths and globs, in the order given, each glob sorted. Raises ``ConfigurationError`` if one is empty."""
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise ConfigurationError(f"--input {pattern}: no such file")
        found += files
    if len(set(found)) != len(found):
        raise ConfigurationError(f"--input {' '.join(patterns)}: names a file twice")
    return found


def read_batches(paths: Sequence[Path]) -> Iterator[LineBatch]:
    """All lines of all files, about a megabyte at a time. Raises ``DataError`` for a damaged compressed file."""
    num_before = 0
    for path in paths:
        number = 1
        with open(path, "rb") as raw:
            stream = _decompressed(path, raw)
            try:
                while lines := stream.readlines(_BATCH_BYTES):
                    yield LineBatch(str(path), number, tuple(lines), num_before + raw.tell())
                    number += len(lines)
            except (EOFError, zlib.error, gzip.BadGzipFile, _ZstandardError) as error:
                raise DataError(f"{path}: damaged or truncated after line {number - 1} ({error})") from error
        num_before += path.stat().st_size


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardReader(raw), _BATCH_BYTES)
    return raw


class _ZstandardError(Exception):
    """A damaged stream."""


class _ZstandardReader(io.RawIOBase):
    """Frames of a .zst file one after the other. The library's own reader takes a truncated file for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._library = zstandard
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._frame.unused_data if self._frame.eof else self._raw.read(_BATCH_BYTES)
            if self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
                self._is_inside = False
                data = data or self._raw.read(_BATCH_BYTES)
            if not data:
                if self._is_inside:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            self._is_inside = True
            try:
                self._pending = memoryview(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise _ZstandardError(str(error)) from error
            self._is_inside = not self._frame.eof
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
