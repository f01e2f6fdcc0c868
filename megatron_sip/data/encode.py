"""What a worker does with a batch of lines: parse, filter, tokenize, and account for every line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.filters import DocumentFilter, FilterConfig
from megatron_sip.data.indexed import token_dtype
from megatron_sip.data.jsonl import LineBatch
from megatron_sip.data.readers import ReadConfig
from megatron_sip.data.records import BrokenLine, parse_batch
from megatron_sip.data.sources import Sources, coded, source_of
from megatron_sip.errors import DataError
from megatron_sip.tokenizer import Tokenizer
from megatron_sip.tokenizer.base import joined


@dataclass(frozen=True)
class EncodedColumn:
    """The documents of one field of a batch."""

    tokens: bytes
    lengths: NDArray[np.int32]
    num_empty: int
    sources: Sources | None = None
    """Where each of these documents is from, if that is asked for."""


@dataclass(frozen=True)
class EncodedBatch:
    """What a worker returns for a ``LineBatch``."""

    columns: tuple[EncodedColumn, ...]
    num_lines: int
    num_documents: int
    num_blank: int
    num_text_bytes: int
    num_bytes_read: int
    errors: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Row:
    """A document that stays."""

    number: int
    texts: tuple[str, ...]
    source: str


class LineEncoder:
    """Parses, filters and tokenizes a batch of lines. Built once in every worker."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        json_keys: Sequence[str],
        append_eod: bool,
        read: ReadConfig | None = None,
        filters: FilterConfig | None = None,
        source_field: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._keys = tuple(json_keys)
        self._append_eod = append_eod
        self._read = read or ReadConfig()
        self._filter = DocumentFilter(filters or FilterConfig())
        self._source_field = source_field
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        rows: list[_Row] = []
        errors: dict[int, str] = {}
        dropped: dict[str, int] = {}
        num_blank = 0
        for item in parse_batch(batch, self._keys, self._read):
            if item is None:
                num_blank += 1
            elif isinstance(item, BrokenLine):
                errors[item.number] = item.message
            else:
                try:
                    rule = self._filter(item)
                except ValueError as error:
                    errors[item.number] = str(error)
                    continue
                if rule is None:
                    source = "" if self._source_field is None else source_of(item.fields, self._source_field)
                    rows.append(_Row(item.number, item.texts, source))
                else:
                    dropped[rule] = dropped.get(rule, 0) + 1
        columns = self._encode_rows(rows, errors)
        return EncodedBatch(
            columns=columns,
            num_lines=batch.num_lines,
            num_documents=batch.num_lines - num_blank - len(errors) - sum(dropped.values()),
            num_blank=num_blank,
            num_text_bytes=_num_bytes(batch, rows),
            num_bytes_read=batch.num_bytes_read,
            errors=tuple(f"{batch.path}:{number}: {errors[number]}" for number in sorted(errors)),
            dropped=dropped,
        )

    def _encode_rows(self, rows: Sequence[_Row], errors: dict[int, str]) -> tuple[EncodedColumn, ...]:
        try:
            return self._encode_columns(rows)
        except DataError:
            # A text that the tokenizer refuses: find its line.
            good = []
            for row in rows:
                try:
                    self._encode_columns([row])
                    good.append(row)
                except DataError as error:
                    errors[row.number] = str(error)
            return self._encode_columns(good)

    def _encode_columns(self, rows: Sequence[_Row]) -> tuple[EncodedColumn, ...]:
        sources = [row.source for row in rows]
        return tuple(self._encode([row.texts[i] for row in rows], sources) for i in range(len(self._keys)))

    def _encode(self, texts: Sequence[str], sources: Sequence[str]) -> EncodedColumn:
        tokens, lengths = self._tokenizer.encode_packed(texts)
        kept = lengths[lengths > 0]
        after = (self._tokenizer.eod_id,) if self._append_eod else ()
        stream, kept = joined(tokens.astype(self._dtype, copy=False), kept, (), after)
        found = None
        if self._source_field is not None:
            found = coded(source for source, length in zip(sources, lengths.tolist(), strict=True) if length)
        return EncodedColumn(stream.tobytes(), kept.astype(np.int32), len(texts) - len(kept), found)


def _num_bytes(batch: LineBatch, rows: Sequence[_Row]) -> int:
    """Bytes of input: of the lines, or of a table's kept texts."""
    if batch.lines:
        return sum(map(len, batch.lines)) + len(batch.lines)
    return sum(len(text.encode()) for row in rows for text in row.texts)
