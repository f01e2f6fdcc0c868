"""Lines and rows to records: parsing, fields by dotted path, and what is wrong with a line that is broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_sip.data.jsonl import LineBatch
from megatron_sip.data.readers import ReadConfig, document_id

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SIGNALS = "quality_signals"
DUPLICATE = "is_duplicate"


@dataclass(frozen=True)
class Record:
    """A document as it came: its text fields, and everything else that its line holds."""

    number: int
    """Line or row of its file, from 1."""
    texts: tuple[str, ...]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class BrokenLine:
    """Why a line gives no document."""

    number: int
    message: str


def parse_batch(
    batch: LineBatch, keys: Sequence[str], config: ReadConfig | None = None
) -> Iterator[Record | BrokenLine | None]:
    """One item per line or row, in order: a record, what is wrong, or None for a line of white space."""
    rule = config or ReadConfig()
    source: Sequence[bytes | Mapping[str, Any] | str] = batch.lines or batch.rows
    for number, line in enumerate(source, start=batch.first_line):
        if isinstance(line, bytes) and not line.strip():
            yield None
            continue
        try:
            fields, is_checked = _fields(line, rule)
            if batch.signals or batch.duplicates:
                fields = _with_side_files(fields, batch, number)
            texts = tuple(_text(fields, key, rule, is_checked) for key in keys)
            yield Record(number, texts, fields if batch.lines else _readable(fields))
        except ValueError as error:
            yield BrokenLine(number, str(error))


def _fields(line: bytes | Mapping[str, Any] | str, rule: ReadConfig) -> tuple[Mapping[str, Any], bool]:
    """The fields of a line, and whether every text in them is known to be valid."""
    if isinstance(line, str):
        raise ValueError(line)
    if not isinstance(line, bytes):
        return line, False
    if len(line) > rule.max_line_bytes:
        raise ValueError(f"longer than {rule.max_line_bytes:,} bytes; raise --max-line-mb if it is one document")
    try:
        row, is_checked = orjson.loads(line), True
    except orjson.JSONDecodeError:
        # The slow way says what is wrong, and takes what is not strict JSON but common: NaN, lone surrogates.
        row, is_checked = _parse_slowly(line, rule), False
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    return row, is_checked


def _parse_slowly(line: bytes, rule: ReadConfig) -> Any:
    try:
        return json.loads(_decode(line.removeprefix(_BYTE_ORDER_MARK), rule, "the line"))
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("broken JSON: nested too deeply") from error


def _decode(value: bytes, rule: ReadConfig, what: str) -> str:
    try:
        return value.decode("utf-8", "strict" if rule.utf8_errors == "fail" else rule.utf8_errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 at byte {error.start} of {what} (--utf8-errors replace or ignore takes it)"
        ) from error


def _readable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row with text where the reader left bytes: for filters, which compare and do not keep it."""
    return {
        name: str(value, "utf-8", "replace") if isinstance(value, bytes) else value for name, value in fields.items()
    }


def _with_side_files(fields: Mapping[str, Any], batch: LineBatch, number: int) -> dict[str, Any]:
    joined = dict(fields)
    joined[DUPLICATE] = number in batch.duplicates
    if batch.signals:
        try:
            beside = orjson.loads(batch.signals[number - batch.first_line])
            named, signals = beside.get("id"), beside[SIGNALS]
        except (orjson.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {number} of its quality signals is broken ({error})") from error
        if named is not None and named != document_id(Path(batch.path), number):
            raise ValueError(f"line {number} of its quality signals is of document {named!r}: files do not match")
        joined[SIGNALS] = signals
    return joined


def lookup(fields: Mapping[str, Any], path: str) -> Any:
    """A field by name, or by dotted path through objects, also those stored as JSON text. Raises ``ValueError``."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for name in path.split("."):
        value = unpacked(value)
        if not isinstance(value, Mapping) or name not in value:
            has = ", ".join(map(repr, list(value)[:8])) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(f"no field {path!r}; it has {has}")
        value = value[name]
    return value


def unpacked(value: Any) -> Any:
    """What a field holds, where some copies of a corpus store objects as JSON text. Raises ``ValueError``."""
    if isinstance(value, str | bytes) and value[:1] in ("{", b"{"):
        return orjson.loads(value)
    return value


def _text(fields: Mapping[str, Any], key: str, rule: ReadConfig, is_checked: bool) -> str:
    text = fields[key] if key in fields else lookup(fields, key)
    if isinstance(text, bytes):
        return _decode(text, rule, f"field {key!r}")
    if not isinstance(text, str):
        raise ValueError(f"field {key!r} is {type(text).__name__}, not text")
    if is_checked or (found := _SURROGATE.search(text)) is None:
        return text
    if rule.utf8_errors == "fail":
        raise ValueError(f"field {key!r} holds half of a surrogate pair at character {found.start()}")
    return _SURROGATE.sub("\ufffd" if rule.utf8_errors == "replace" else "", text)
