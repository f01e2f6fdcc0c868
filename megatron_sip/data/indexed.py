"""Tokenized corpora: Megatron's ``.bin``/``.idx`` pair, and a sidecar ``.meta.json`` that says what the ids mean.

``.bin`` holds the tokens of all documents, one after the other, little-endian. ``.idx`` holds: magic, version, dtype
code, number of sequences, number of documents + 1, lengths (int32), byte offsets (int64), document bounds (int64).
The files equal those of Megatron-Core's ``IndexedDatasetBuilder`` byte for byte; its ``IndexedDataset`` reads them.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.sources import SourceColumn, Sources, sources_path
from megatron_sip.errors import DataError
from megatron_sip.files import NO_ROOM, PARTIAL, cannot_write

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_FORMAT_VERSION = 1
_MOST_IDS = 2**31 - 1
_FULL_SCAN_BYTES = 256 << 20
"""Without a sidecar, a corpus up to this size is searched for ids beyond the vocabulary; a larger one is sampled."""


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Megatron's rule: uint16 under 65,500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True)
class CorpusMeta:
    """The sidecar of a corpus."""

    tokenizer_fingerprint: str
    tokenizer_type: str
    vocab_size: int
    eod_id: int
    append_eod: bool
    num_documents: int
    num_tokens: int
    num_text_bytes: int = 0
    num_skipped: int = 0
    """Input lines that were left out for an error, counted so that none is lost in silence."""
    num_empty: int = 0
    tokenizer_engine: str = ""
    """Library that tokenized, and its version; several where shards were made by several."""
    format_version: int = _FORMAT_VERSION


def meta_path(prefix: str) -> Path:
    """Where the sidecar of a corpus is."""
    return Path(f"{prefix}.meta.json")


def read_meta(prefix: str) -> CorpusMeta | None:
    """The sidecar, or None for a corpus of another tool. Raises ``DataError`` if it is damaged."""
    path = meta_path(prefix)
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        meta = CorpusMeta(**values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); delete it, or run tools/preprocess_data.py again") from error
    if meta.format_version != _FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {meta.format_version}, this program reads {_FORMAT_VERSION}; preprocess again"
        )
    return meta


class IndexedWriter:
    """Writes a corpus under temporary names and gives it its own at ``close``: a corpus is whole or is not there.

    Use as a context manager: leaving it by an exception removes the temporary files. A killed process leaves only
    ``*.partial`` files, which the next run overwrites.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(token_dtype(vocab_size))
        self._lengths: list[NDArray[np.int32]] = []
        self.num_documents = 0
        self.num_tokens = 0
        self._bin_partial = Path(f"{prefix}.bin{PARTIAL}")
        self._partials = [self._bin_partial, Path(f"{prefix}.idx{PARTIAL}"), Path(f"{prefix}.meta.json{PARTIAL}")]
        self._sources: SourceColumn | None = None
        self._sources_partial = Path(f"{sources_path(prefix)}{PARTIAL}")
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._bin_partial, "wb")  # noqa: SIM115  (closed by close or discard)
        except OSError as error:
            raise cannot_write(self._bin_partial, error) from None

    def add_documents(self, tokens: bytes, lengths: NDArray[np.int32], sources: Sources | None = None) -> None:
        """Append documents given as the bytes of their tokens (of ``self.dtype``) and their lengths in tokens.

        ``sources``: where each is from; for all documents of a corpus or for none. Raises ``DataError`` if the disk
        is full.
        """
        num_tokens = int(lengths.sum(dtype=np.int64))
        if len(tokens) != num_tokens * self.dtype.itemsize:
            raise ValueError(f"{len(tokens)} bytes given for {num_tokens} tokens of {self.dtype}")
        if sources is not None:
            if len(sources.codes) != len(lengths):
                raise ValueError(f"{len(sources.codes)} sources given for {len(lengths)} documents")
            self._sources = self._sources or SourceColumn()
            self._sources.add(sources)
        self._guarded(lambda: self._bin.write(tokens))
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.num_documents += len(lengths)
        self.num_tokens += num_tokens

    def add_document(self, tokens: NDArray[np.integer]) -> None:
        """Append one document of token ids."""
        self.add_documents(tokens.astype(self.dtype).tobytes(), np.array([len(tokens)], dtype=np.int32))

    def close(self, meta: CorpusMeta) -> None:
        """Make the corpus visible. The ``.idx`` comes last: without it no reader opens the rest."""
        bin_partial, idx_partial, meta_partial = self._partials
        self._guarded(self._sync_bin)
        self._bin.close()
        self._guarded(lambda: self._write_index(idx_partial))
        text = json.dumps(asdict(meta), indent=1) + "\n"
        self._guarded(lambda: _write_synced(meta_partial, text.encode()))
        content = None if self._sources is None else self._sources.as_bytes()
        if content is not None:
            self._guarded(lambda: _write_synced(self._sources_partial, content))
        # An older corpus of this name must not meet the new .bin.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        if content is None:
            sources_path(self.prefix).unlink(missing_ok=True)
        else:
            os.replace(self._sources_partial, sources_path(self.prefix))
        os.replace(bin_partial, f"{self.prefix}.bin")
        os.replace(meta_partial, meta_path(self.prefix))
        os.replace(idx_partial, f"{self.prefix}.idx")
        _sync_folder(Path(self.prefix).parent)

    def discard(self) -> None:
        """Remove everything written so far."""
        # On a full disk closing fails too: it writes what is still buffered, which nobody wants any more.
        with suppress(OSError):
            self._bin.close()
        for path in (*self._partials, self._sources_partial):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        elif not self._bin.closed:
            self.discard()
            raise RuntimeError("IndexedWriter left without close(meta)")

    def _sync_bin(self) -> None:
        self._bin.flush()
        os.fsync(self._bin.fileno())

    def _write_index(self, path: Path) -> None:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        offsets = (ends - lengths) * self.dtype.itemsize
        bounds = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _HEADER.pack(_MAGIC, 1, _CODES[self.dtype.type], len(lengths), len(lengths) + 1)
        _write_synced(path, header, lengths.tobytes(), offsets.astype(np.int64).tobytes(), bounds.tobytes())

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in (*NO_ROOM, errno.EFBIG):
                raise
            written = self.num_tokens * self.dtype.itemsize
            raise DataError(
                f"{self.prefix}.bin: {os.strerror(error.errno)} after {written:,} bytes; nothing was left behind, free "
                "space or choose another --output-prefix"
            ) from error


def _write_synced(path: Path, *blocks: bytes) -> None:
    with open(path, "wb") as stream:
        for block in blocks:
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class IndexedCorpus:
    """A checked, read-only corpus: documents, and the packed stream of all their tokens."""

    def __init__(self, prefix: str, vocab_size: int) -> None:
        # Imported here: Megatron-Core takes seconds to import, and preprocessing does not need it.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.prefix = prefix
        self._vocab_size = vocab_size
        self._dataset = IndexedDataset(prefix)
        self._dtype = np.dtype(self._dataset.index.dtype)
        bounds = np.asarray(self._dataset.document_indices)
        ends = np.concatenate([[0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)])
        self._starts: NDArray[np.int64] = ends[bounds]
        """First token of each document in the packed stream, and the end of the last one, [documents + 1]."""

    @property
    def num_documents(self) -> int:
        return len(self._starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, [documents]."""
        return np.diff(self._starts)

    def document_length(self, index: int) -> int:
        """Tokens of one document."""
        return int(self._starts[index + 1] - self._starts[index])

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """A copy of ``count`` tokens of the packed stream from token ``start``, int64 [count]."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start}..{start + count} of {self.prefix}, which has {self.num_tokens}")
        raw = self._dataset.bin_reader.read(dtype=self._dtype.type, count=count, offset=start * self._dtype.itemsize)
        # A copy: the mapped file may be closed before the sample is used.
        values = raw.astype(np.int64)
        if count and not 0 <= values.min() <= values.max() < self._vocab_size:
            self._raise_vocabulary(values, start)
        return values

    def document(self, index: int, start: int = 0, count: int | None = None) -> NDArray[np.int64]:
        """Tokens ``start`` to ``start + count`` of a document, int64."""
        first, end = int(self._starts[index]), int(self._starts[index + 1])
        length = end - first - start if count is None else count
        if first + start + length > end:
            raise IndexError(f"tokens {start}..{start + length} of document {index} of {self.prefix}: it ends before")
        return self.tokens(first + start, length)

    def _raise_vocabulary(self, values: NDArray[np.int64], start: int) -> None:
        wrong = values[(values < 0) | (values >= self._vocab_size)][0]
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        raise DataError(
            f"{self.prefix}.bin: token id {wrong} (about document {document}) is not in the vocabulary of "
            f"{self._vocab_size}; the corpus belongs to another tokenizer: preprocess it with this run's "
            "--tokenizer-model"
        )

    def search_foreign_ids(self) -> None:
        """Raise ``DataError`` if an id is not in the vocabulary: all of a small corpus, 64 samples of a large one."""
        span = (1 << 20) // self._dtype.itemsize
        if self.num_tokens * self._dtype.itemsize <= _FULL_SCAN_BYTES:
            starts = np.arange(0, self.num_tokens, span)
        else:
            starts = np.linspace(0, self.num_tokens - span, 64).astype(np.int64)
        for start in starts:
            self.tokens(int(start), min(span, self.num_tokens - int(start)))


def open_indexed(prefix: str, vocab_size: int, fingerprint: str | None = None) -> IndexedCorpus:
    """Open a corpus by its path without ``.bin``, checked against the run's tokenizer.

    ``fingerprint`` None skips the comparison with the sidecar. Raises ``DataError``: a missing, truncated, damaged or
    empty file, an id beyond the vocabulary, or a corpus of another tokenizer.
    """
    require_files(prefix)
    _check_files(prefix)
    meta = read_meta(prefix)
    if meta is not None and fingerprint is not None and meta.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{prefix}: made with another tokenizer ({meta.tokenizer_type}, {meta.vocab_size} ids, "
            f"{meta.tokenizer_fingerprint}; this run has {vocab_size} ids, {fingerprint}); preprocess it again, "
            "or give the --tokenizer-model it was made with"
        )
    corpus = IndexedCorpus(prefix, vocab_size)
    if meta is not None and (meta.num_documents, meta.num_tokens) != (corpus.num_documents, corpus.num_tokens):
        raise DataError(
            f"{meta_path(prefix)}: tells of {meta.num_documents} documents and {meta.num_tokens} tokens, the files "
            f"have {corpus.num_documents} and {corpus.num_tokens}; they are of different runs: preprocess again"
        )
    if meta is None or fingerprint is None:
        corpus.search_foreign_ids()
    return corpus


def open_as_recorded(prefix: str) -> IndexedCorpus:
    """Open a corpus without its tokenizer, checked against its own sidecar alone. Raises ``DataError`` likewise."""
    require_files(prefix)
    meta = read_meta(prefix)
    if meta is None:
        return open_indexed(prefix, _MOST_IDS)
    return open_indexed(prefix, meta.vocab_size, meta.tokenizer_fingerprint)


def require_files(prefix: str) -> None:
    """Raise ``DataError`` unless both files of a corpus are there."""
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            raise DataError(f"{prefix}: give the path without {suffix}")
        if not Path(prefix + suffix).is_file():
            raise DataError(f"{prefix}{suffix}: no such file; write the corpus with tools/preprocess_data.py")


def _check_files(prefix: str) -> None:
    """Raise ``DataError`` if the sizes of the two files do not fit what the index says."""
    idx, bin_size = Path(f"{prefix}.idx"), Path(f"{prefix}.bin").stat().st_size
    again = "preprocess the corpus again"
    with open(idx, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or head[:9] != _MAGIC:
        raise DataError(f"{idx}: not a Megatron index (magic {head[:9]!r}); {again}")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{idx}: version {version}, dtype code {code}: only version 1 with integer tokens is read")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    size = idx.stat().st_size
    if size not in (expected, expected + num_sequences):  # the second with the modes of a multimodal corpus
        raise DataError(f"{idx}: {size:,} bytes where {num_sequences} sequences need {expected:,}: truncated; {again}")
    index = np.memmap(idx, mode="r", dtype=np.uint8)
    lengths = np.frombuffer(index, np.int32, num_sequences, _HEADER.size)
    offsets = np.frombuffer(index, np.int64, num_sequences, _HEADER.size + 4 * num_sequences)
    bounds = np.frombuffer(index, np.int64, num_bounds, _HEADER.size + 12 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64)
    num_tokens = int(ends[-1]) if num_sequences else 0
    itemsize = np.dtype(_DTYPES[code]).itemsize
    if num_tokens == 0:
        raise DataError(f"{prefix}: the corpus is empty ({num_sequences} documents, no token): check its input")
    if lengths.min() < 0 or not np.array_equal(offsets, (ends - lengths) * itemsize):
        raise DataError(f"{idx}: offsets do not follow from the lengths: damaged or of a broken merge; {again}")
    if num_bounds < 1 or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise DataError(f"{idx}: document bounds do not cover the {num_sequences} sequences: damaged; {again}")
    if bin_size != num_tokens * itemsize:
        state = "truncated" if bin_size < num_tokens * itemsize else "longer than its index"
        raise DataError(
            f"{prefix}.bin: {bin_size:,} bytes where the index needs {num_tokens * itemsize:,}: {state}; {again}"
        )
