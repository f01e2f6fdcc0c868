"""Small corpora for tests of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sip.data.indexed import CorpusMeta, IndexedWriter


def write_corpus(
    folder: Path,
    documents: Sequence[Sequence[int]],
    name: str = "corpus",
    vocab_size: int = 1000,
    fingerprint: str = "sha256:a",
) -> str:
    """Write token id documents as a corpus; return its prefix."""
    prefix = str(folder / name)
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.asarray(document, dtype=np.int64))
        writer.close(
            CorpusMeta(
                tokenizer_fingerprint=fingerprint,
                tokenizer_type="NullTokenizer",
                vocab_size=vocab_size,
                eod_id=vocab_size - 1,
                append_eod=False,
                num_documents=writer.num_documents,
                num_tokens=writer.num_tokens,
            )
        )
    return prefix


def numbered_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of the given lengths whose tokens count on through all of them: each token is its own address."""
    starts = np.cumsum([0, *lengths])
    return [list(range(int(start), int(start) + length)) for start, length in zip(starts[:-1], lengths, strict=True)]
