"""What a worker does with a batch of lines: parse, filter, tokenize, and account for every line."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.filters import DocumentFilter, FilterConfig
from megatron_sip.data.indexed import token_dtype
from megatron_sip.data.jsonl import LineBatch
from megatron_sip.data.readers import ReadConfig
from megatron_sip.data.records import BrokenLine, parse_batch
from megatron_sip.errors import DataError
from megatron_sip.tokenizer import Tokenizer

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class EncodedColumn:
    """The documents of one field of a batch."""

    tokens: bytes
    lengths: NDArray[np.int32]
    num_empty: int


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


class LineEncoder:
    """Parses, filters and tokenizes a batch of lines. Built once in every worker."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        json_keys: Sequence[str],
        append_eod: bool,
        read: ReadConfig | None = None,
        filters: FilterConfig | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._keys = tuple(json_keys)
        self._append_eod = append_eod
        self._read = read or ReadConfig()
        self._filter = DocumentFilter(filters or FilterConfig())
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        rows: list[tuple[int, tuple[str, ...]]] = []
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
                    rows.append((item.number, item.texts))
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

    def _encode_rows(
        self, rows: Sequence[tuple[int, tuple[str, ...]]], errors: dict[int, str]
    ) -> tuple[EncodedColumn, ...]:
        try:
            return self._encode_columns([texts for _, texts in rows])
        except DataError:
            # A text that the tokenizer refuses: find its line.
            good = []
            for number, texts in rows:
                try:
                    self._encode_columns([texts])
                    good.append(texts)
                except DataError as error:
                    errors[number] = str(error)
            return self._encode_columns(good)

    def _encode_columns(self, rows: Sequence[tuple[str, ...]]) -> tuple[EncodedColumn, ...]:
        return tuple(self._encode([row[i] for row in rows]) for i in range(len(self._keys)))

    def _encode(self, texts: Sequence[str]) -> EncodedColumn:
        encoded = [tokens for tokens in self._tokenizer.encode_batch(texts) if len(tokens)]
        eod = np.array([self._tokenizer.eod_id] if self._append_eod else [], dtype=self._dtype)
        parts = [part for tokens in encoded for part in (tokens.astype(self._dtype, copy=False), eod)]
        lengths = np.array([len(tokens) + len(eod) for tokens in encoded], dtype=np.int32)
        stream = np.concatenate(parts) if parts else np.zeros(0, self._dtype)
        return EncodedColumn(stream.tobytes(), lengths, len(texts) - len(encoded))


def _num_bytes(batch: LineBatch, rows: Sequence[tuple[int, tuple[str, ...]]]) -> int:
    """Bytes of input: of the lines, or of a table's kept texts."""
    if batch.lines:
        return sum(map(len, batch.lines)) + len(batch.lines)
    return sum(len(text.encode()) for _, texts in rows for text in texts)


def die_with_parent(parent: int) -> None:
    """End this worker when its parent is killed: a worker left behind would write on beside a repeated run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
