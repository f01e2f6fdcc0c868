"""jsonl documents to tokenized corpora: parallel, in input order, and without a silent loss.

One process reads lines and writes results; workers parse and tokenize a batch of lines at a time and return the
bytes of their tokens. The result does not depend on the number of workers.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.indexed import CorpusMeta, IndexedWriter, token_dtype
from megatron_sip.data.jsonl import LineBatch, expand_inputs, read_batches
from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer

_MAX_SHOWN = 20
_BATCHES_AHEAD = 3
"""Batches in flight per worker: enough to keep it busy, few enough to keep memory flat."""


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, how to tokenize it, where to write it."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    workers: int = 1
    append_eod: bool = False
    on_error: str = "fail"
    log_interval: int = 10_000

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for options that cannot work."""
        self.tokenizer.validate()
        if self.on_error not in ("skip", "fail"):
            raise ConfigurationError(f"--on-error {self.on_error}: choose skip or fail")
        for name in ("workers", "log_interval"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigurationError(f"--json-keys {' '.join(self.json_keys)}: name each field once")

    def prefix(self, key: str) -> str:
        """Path of a field's corpus, named as Megatron-LM's tool names it."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class PreprocessReport:
    """Where every input line went: ``num_lines`` = ``num_documents`` + ``num_blank`` + ``num_errors``."""

    num_lines: int = 0
    num_documents: int = 0
    """Lines that hold a document; one without text is in ``num_empty`` of its field besides."""
    num_blank: int = 0
    """Lines of white space."""
    num_errors: int = 0
    """Lines left out because they are broken."""
    num_empty: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    num_text_bytes: int = 0
    errors: list[str] = field(default_factory=list)
    """The first errors, with file and line."""
    elapsed_s: float = 0.0


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


class LineEncoder:
    """Parses and tokenizes a batch of lines. Built once in every worker."""

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._keys = tuple(json_keys)
        self._append_eod = append_eod
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        rows: list[tuple[str, ...]] = []
        errors: list[str] = []
        num_blank = 0
        for number, line in enumerate(batch.lines, start=batch.first_line):
            if not line.strip():
                num_blank += 1
                continue
            try:
                rows.append(_texts(line, self._keys))
            except ValueError as error:
                errors.append(f"{batch.path}:{number}: {error}")
        return EncodedBatch(
            columns=tuple(self._encode([row[i] for row in rows]) for i in range(len(self._keys))),
            num_lines=len(batch.lines),
            num_documents=len(rows),
            num_blank=num_blank,
            num_text_bytes=sum(map(len, batch.lines)),
            num_bytes_read=batch.num_bytes_read,
            errors=tuple(errors),
        )

    def _encode(self, texts: Sequence[str]) -> EncodedColumn:
        encoded = [tokens for tokens in self._tokenizer.encode_batch(texts) if len(tokens)]
        eod = np.array([self._tokenizer.eod_id] if self._append_eod else [], dtype=self._dtype)
        parts = [part for tokens in encoded for part in (tokens.astype(self._dtype, copy=False), eod)]
        lengths = np.array([len(tokens) + len(eod) for tokens in encoded], dtype=np.int32)
        stream = np.concatenate(parts) if parts else np.zeros(0, self._dtype)
        return EncodedColumn(stream.tobytes(), lengths, len(texts) - len(encoded))


def _texts(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """The text fields of a line. Raises ``ValueError`` that says what is wrong with it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("broken JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object was expected, not {type(row).__name__}")
    for key in keys:
        if key not in row:
            raise ValueError(f"no field {key!r}; it has {', '.join(map(repr, list(row)[:8]))}")
        if not isinstance(row[key], str):
            raise ValueError(f"field {key!r} is {type(row[key]).__name__}, not text")
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"field {key!r} holds half of a surrogate pair at character {error.start}") from error
    return tuple(row[key] for key in keys)


_worker_encoder: LineEncoder | None = None


def _start_worker(config: PreprocessConfig) -> None:
    # The one global: a pool can hand its workers nothing else that lives as long as they do.
    global _worker_encoder
    _worker_encoder = LineEncoder(build_tokenizer(config.tokenizer), config.json_keys, config.append_eod)


def _encode_in_worker(batch: LineBatch) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder(batch)


def _encoded_batches(config: PreprocessConfig, tokenizer: Tokenizer, paths: Sequence[Path]) -> Iterator[EncodedBatch]:
    """Results in input order, with a bounded number of batches in flight."""
    if config.workers == 1:
        yield from map(LineEncoder(tokenizer, config.json_keys, config.append_eod), read_batches(paths))
        return
    waiting: deque[Future[EncodedBatch]] = deque()
    pool = ProcessPoolExecutor(config.workers, get_context("spawn"), _start_worker, (config,))
    try:
        for batch in read_batches(paths):
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > config.workers * _BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died (killed, or out of memory with --workers {config.workers}); nothing was written: "
            "run again, with fewer workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def preprocess(config: PreprocessConfig, log: Callable[[str], None] = print) -> PreprocessReport:
    """Write one corpus per field, ``<output_prefix>_<field>_document.bin`` and so on: whole ones, or none.

    Raises ``ConfigurationError``; ``DataError`` for a broken line under ``--on-error fail``, for input without any
    document, and for a full disk.
    """
    config.validate()
    paths = expand_inputs(config.inputs)
    tokenizer = build_tokenizer(config.tokenizer)
    report = PreprocessReport(num_empty=dict.fromkeys(config.json_keys, 0))
    progress = _Progress(sum(path.stat().st_size for path in paths), config.log_interval, log)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(config.prefix(key), tokenizer.vocab_size)) for key in config.json_keys
        ]
        for batch in _encoded_batches(config, tokenizer, paths):
            _count(batch, report, config.on_error)
            for key, writer, column in zip(config.json_keys, writers, batch.columns, strict=True):
                writer.add_documents(column.tokens, column.lengths)
                report.num_empty[key] += column.num_empty
            progress.show(report, sum(writer.num_tokens for writer in writers), batch.num_bytes_read)
        for key, writer in zip(config.json_keys, writers, strict=True):
            if not writer.num_documents:
                raise DataError(_nothing_found(config, key, report))
        for key, writer in zip(config.json_keys, writers, strict=True):
            report.num_tokens[key] = writer.num_tokens
            writer.close(_meta(config, tokenizer, writer, report, report.num_empty[key]))
    report.elapsed_s = progress.elapsed_s
    return report


def _count(batch: EncodedBatch, report: PreprocessReport, on_error: str) -> None:
    if batch.errors and on_error == "fail":
        raise DataError(f"{batch.errors[0]}; mend the line, or leave such lines out with --on-error skip")
    report.num_lines += batch.num_lines
    report.num_documents += batch.num_documents
    report.num_blank += batch.num_blank
    report.num_errors += len(batch.errors)
    report.num_text_bytes += batch.num_text_bytes
    report.errors += batch.errors[: max(0, _MAX_SHOWN - len(report.errors))]


def _nothing_found(config: PreprocessConfig, key: str, report: PreprocessReport) -> str:
    return (
        f"{' '.join(config.inputs)}: no document with text in {key!r} among {report.num_lines} lines "
        f"({report.num_blank} blank, {report.num_errors} broken, {report.num_empty[key]} empty); no corpus was written"
        + "".join(f"\n  {error}" for error in report.errors)
    )


def _meta(
    config: PreprocessConfig, tokenizer: Tokenizer, writer: IndexedWriter, report: PreprocessReport, num_empty: int
) -> CorpusMeta:
    return CorpusMeta(
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_type=config.tokenizer.tokenizer_type,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        append_eod=config.append_eod,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_text_bytes=report.num_text_bytes,
        num_skipped=report.num_errors,
        num_empty=num_empty,
    )


class _Progress:
    """A line every ``interval`` documents: speed and time to go."""

    def __init__(self, total_bytes: int, interval: int, log: Callable[[str], None]) -> None:
        self._total = total_bytes
        self._interval = interval
        self._next = interval
        self._log = log
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def show(self, report: PreprocessReport, num_tokens: int, num_bytes_read: int) -> None:
        if report.num_lines < self._next:
            return
        self._next = report.num_lines + self._interval
        elapsed = max(self.elapsed_s, 1e-9)
        to_go = elapsed * (self._total - num_bytes_read) / max(num_bytes_read, 1)
        self._log(
            f"{report.num_documents:,} documents ({100 * num_bytes_read / max(self._total, 1):.0f} %), "
            f"{report.num_text_bytes / elapsed / 1e6:.1f} MB/s, {num_tokens / elapsed:,.0f} tokens/s, "
            f"{report.num_errors} errors, {to_go:.0f} s to go"
        )
