"""Files of any supported kind to batches of lines: jsonl (.gz, .zst), RedPajama-V2 with its side files, Parquet."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sip.data.jsonl import MAX_LINE_BYTES, LineBatch, read_lines
from megatron_sip.errors import ConfigurationError, DataError

FORMATS = ("auto", "jsonl", "parquet", "redpajama-v2")
UTF8_RULES = ("fail", "replace", "ignore")
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
_ROWS_PER_BATCH = 256
_TOP_LEVEL = re.compile(r"^[^.]+")


@dataclass(frozen=True)
class ReadConfig:
    """What input files are and how text that is not UTF-8 is treated."""

    format: str = "auto"
    """``auto``: by the file's suffix. ``redpajama-v2``: documents joined with quality signals and duplicates."""
    utf8_errors: str = "fail"
    """``fail``: such a line is broken (see ``--on-error``); ``replace`` by U+FFFD; ``ignore``: leave the bytes out."""
    signals: str = "required"
    """RedPajama-V2: ``required`` (but for the tail bucket, which has none), ``optional`` or ``none``."""
    max_line_bytes: int = MAX_LINE_BYTES
    columns: tuple[str, ...] = ()
    """Parquet columns to read; empty reads all."""

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for options that cannot work."""
        for flag, value, choices in (
            ("--format", self.format, FORMATS),
            ("--utf8-errors", self.utf8_errors, UTF8_RULES),
            ("--signals", self.signals, ("required", "optional", "none")),
        ):
            if value not in choices:
                raise ConfigurationError(f"{flag} {value}: choose {', '.join(choices)}")
        if self.max_line_bytes < 1:
            raise ConfigurationError(f"--max-line-mb: {self.max_line_bytes} bytes, must be above 0")


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of paths, folders (searched through) and globs, in the order given, each glob and folder sorted.

    Raises ``ConfigurationError`` if one of them names no file, or a file is named twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            files = sorted(p for p in Path(pattern).rglob("*") if p.name.endswith(_SUFFIXES) and _is_document(p))
            if not files:
                raise ConfigurationError(f"--input {pattern}: no file in this folder ends in {', '.join(_SUFFIXES)}")
        else:
            matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            files = [Path(match) for match in matches if Path(match).is_file()]
            if not files:
                raise ConfigurationError(f"--input {pattern}: no such file")
        found += files
    if len(set(found)) != len(found):
        raise ConfigurationError(f"--input {' '.join(patterns)}: names a file twice")
    return found


def _is_document(path: Path) -> bool:
    """Whether a file found in a folder holds documents, not RedPajama-V2's notes on them."""
    return path.is_file() and not path.name.endswith((".signals.json.gz", ".duplicates.parquet", ".minhash.parquet"))


def read_batches(paths: Sequence[Path], config: ReadConfig | None = None) -> Iterator[LineBatch]:
    """All lines of all files, about a megabyte at a time. Raises ``DataError`` for a damaged file."""
    num_before = 0
    for path in paths:
        for batch in read_file(path, config or ReadConfig()):
            yield replace(batch, num_bytes_read=num_before + batch.num_bytes_read) if num_before else batch
        num_before += path.stat().st_size


def read_file(path: Path, config: ReadConfig) -> Iterator[LineBatch]:
    """All lines or rows of one file."""
    if config.format == "redpajama-v2":
        return _read_redpajama(path, config)
    if config.format == "parquet" or (config.format == "auto" and path.suffix == ".parquet"):
        return _read_parquet(path, config)
    return read_lines(path, config.max_line_bytes)


def side_file(path: Path, folder: str, suffix: str) -> Path:
    """The file beside RedPajama-V2 documents: ``documents/a/b/en_head.json.gz`` -> ``<folder>/a/b/en_head<suffix>``.

    Raises ``DataError`` for a path that is not of that form.
    """
    parts = list(path.parts)
    stem = re.sub(r"\.json(\.gz|\.zst)?$", "", path.name)
    if "documents" not in parts[:-1] or stem == path.name:
        raise DataError(
            f"{path}: not a RedPajama-V2 file, documents/<snapshot>/<shard>/<lang>_<bucket>.json.gz; keep the folders "
            "as published, or leave --format redpajama-v2 out"
        )
    position = len(parts) - 2 - parts[-2::-1].index("documents")
    return Path(*parts[:position], folder, *parts[position + 1 : -1], stem + suffix)


def document_id(path: Path, number: int) -> str:
    """RedPajama-V2's name of the document in line ``number`` (from 1): snapshot/shard/lang_bucket.json.gz/row."""
    return f"{'/'.join(path.parts[-3:])}/{number - 1}"


def _read_redpajama(path: Path, config: ReadConfig) -> Iterator[LineBatch]:
    duplicates = _duplicate_lines(path)
    signals_path = side_file(path, "quality_signals", ".signals.json.gz")
    if config.signals == "none" or not signals_path.is_file():
        if config.signals == "required" and not path.name.split(".")[0].endswith("_tail"):
            raise DataError(f"{signals_path}: missing, it belongs to {path}; fetch it, or give --signals optional")
        for batch in read_lines(path, config.max_line_bytes):
            yield replace(batch, duplicates=_within(duplicates, batch))
        return
    pending: list[bytes] = []
    beside = read_lines(signals_path, config.max_line_bytes)
    for batch in read_lines(path, config.max_line_bytes):
        while len(pending) < batch.num_lines:
            more = next(beside, None)
            if more is None:
                raise DataError(
                    f"{signals_path}: ends after line {batch.first_line - 1 + len(pending)}, {path} goes on: the two "
                    "do not belong together, or one is incomplete; fetch both again"
                )
            pending += more.lines
        signals = tuple(pending[: batch.num_lines])
        del pending[: batch.num_lines]
        yield replace(batch, signals=signals, duplicates=_within(duplicates, batch))
    if pending or next(beside, None) is not None:
        raise DataError(f"{signals_path}: has more lines than {path}: they do not belong together; fetch both again")


def _within(duplicates: frozenset[int], batch: LineBatch) -> frozenset[int]:
    """Those of a file's duplicate lines that are in a batch."""
    if not duplicates:
        return duplicates
    return frozenset(n for n in range(batch.first_line, batch.first_line + batch.num_lines) if n in duplicates)


def _duplicate_lines(path: Path) -> frozenset[int]:
    """Numbers of the lines that the duplicates file names; none if there is no such file."""
    beside = side_file(path, "duplicates", ".duplicates.parquet")
    if not beside.is_file():
        return frozenset()
    numbers = set()
    for batch in _read_parquet(beside, ReadConfig(columns=("doc_id",))):
        for row_number, row in enumerate(batch.rows, start=batch.first_line):
            name = row.get("doc_id") if not isinstance(row, str) else None
            name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
            row_of_document = str(name).rpartition("/")[2]
            if not row_of_document.isdecimal():
                raise DataError(f"{beside}:{row_number}: doc_id {name!r} does not end in /<row>; fetch the file again")
            numbers.add(int(row_of_document) + 1)
    return frozenset(numbers)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigurationError("reading Parquet needs pyarrow: pip install 'megatron-sip[parquet]'") from error
    return pyarrow


def _read_parquet(path: Path, config: ReadConfig) -> Iterator[LineBatch]:
    library = _pyarrow()
    number = 1
    size = path.stat().st_size
    try:
        with library.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            wanted = [name for name in dict.fromkeys(map(_top_level(names), config.columns)) if name in names]
            # Of a file without any of them the rows are read all the same, so that each is counted as broken.
            wanted = wanted or names[:1]
            total = max(table.metadata.num_rows, 1)
            for part in table.iter_batches(_ROWS_PER_BATCH, columns=wanted if config.columns else None):
                rows = _rows(part, library)
                done = number - 1 + len(rows)
                yield LineBatch(str(path), number, (), size * done // total, rows=tuple(rows))
                number += len(rows)
    except (library.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or truncated after row {number - 1} ({error})") from error


def _top_level(names: Sequence[str]) -> Any:
    def column(path: str) -> str:
        match = _TOP_LEVEL.match(path)
        return path if path in names or match is None else match.group()

    return column


def _rows(part: Any, library: Any) -> list[dict[str, Any] | str]:
    # Strings as bytes: Arrow checks nothing, and one broken string must not cost the rest of the batch.
    kinds = {library.string(): library.binary(), library.large_string(): library.large_binary()}
    columns = [column.cast(kinds[column.type]) if column.type in kinds else column for column in part.columns]
    bytes_part = library.RecordBatch.from_arrays(columns, names=part.schema.names)
    try:
        rows: list[dict[str, Any] | str] = bytes_part.to_pylist()
    except UnicodeDecodeError:  # a string inside a structure
        return [_row(bytes_part, index) for index in range(bytes_part.num_rows)]
    return rows


def _row(part: Any, index: int) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = part.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} of a nested field"
    return row
