"""Lines of jsonl files (plain, .gz, .zst) in batches that know where they stand."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_sip.errors import DataError

_BATCH_BYTES = 1 << 20
MAX_LINE_BYTES = 512 << 20
"""A longer line is reported as broken and its rest is read over, so that no input can fill the memory."""


@dataclass(frozen=True)
class LineBatch:
    """Whole lines (or rows) of one file, unparsed, and how far reading has come."""

    path: str
    first_line: int
    """Number of the first line or row, from 1."""
    lines: tuple[bytes, ...]
    """Lines without their line end; empty for a table."""
    num_bytes_read: int
    """Bytes of input files consumed so far, as stored: for the ETA."""
    signals: tuple[bytes, ...] = ()
    """RedPajama-V2: the lines of the quality signals file that belong to ``lines``; empty if there are none."""
    duplicates: frozenset[int] = frozenset()
    """RedPajama-V2: numbers of the lines that the duplicates file names."""
    rows: tuple[Mapping[str, Any] | str, ...] = ()
    """Parquet: the rows; text says why a row could not be read."""

    @property
    def num_lines(self) -> int:
        return len(self.lines) or len(self.rows)


def read_lines(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[LineBatch]:
    """All lines of a file, about a megabyte at a time. Raises ``DataError`` for a damaged compressed file.

    A line of more than ``max_line_bytes`` is cut after one byte more than that.
    """
    number = 1
    try:
        with open(path, "rb") as raw:
            for lines in _split(_decompressed(path, raw), max_line_bytes):
                yield LineBatch(str(path), number, tuple(lines), raw.tell())
                number += len(lines)
    except (EOFError, zlib.error, gzip.BadGzipFile, _ZstandardError) as error:
        raise DataError(f"{path}: damaged or truncated after line {number - 1} ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read after line {number - 1} ({error})") from error


def _split(stream: IO[bytes], max_line_bytes: int) -> Iterator[list[bytes]]:
    begun: list[bytes] = []
    size = 0
    while block := stream.read(_BATCH_BYTES):
        head, *rest = block.split(b"\n")
        if size <= max_line_bytes:
            begun.append(head[: max_line_bytes + 1 - size])
        size += len(head)
        if rest:
            yield [b"".join(begun), *rest[:-1]]
            begun, size = [rest[-1][: max_line_bytes + 1]], len(rest[-1])
    if size:
        yield [b"".join(begun)]


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
            data = self._frame.unused_data if self._frame.eof else self._raw.read(_BATCH_BYTES // 8)
            if self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
                self._is_inside = False
                data = data or self._raw.read(_BATCH_BYTES // 8)
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
