"""One interface over every tokenizer library.

Text never turns into a control token: a document that spells ``</s>`` is not cut in two by it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.integer]

_ANCHOR = "\u2042"
"""Stands before a continuation while it is encoded, so that no library takes it for the start of a text. A rare sign
(an asterism) that no vocabulary joins with what follows; a line break would be normalized away by some."""


def library_version(name: str) -> str:
    """An installed library and its version, such as ``tiktoken 0.14.0``."""
    return f"{name} {version(name)}"


def vocabulary_fingerprint(pieces: Iterable[bytes], eod_id: int) -> str:
    """A stable hash of what each id stands for: equal if and only if stored ids mean the same text."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(4, "little"))
        digest.update(piece)
    digest.update(f"eod={eod_id}".encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def joined(
    tokens: TokenArray, lengths: NDArray[np.int64], before: Sequence[int], after: Sequence[int]
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Packed documents with the ids ``before`` and ``after`` around each of them."""
    if not before and not after:
        return tokens, lengths
    longer = lengths + len(before) + len(after)
    ends = np.cumsum(longer)
    result = np.empty(len(tokens) + (len(before) + len(after)) * len(lengths), dtype=tokens.dtype)
    is_text = np.ones(len(result), dtype=bool)
    for positions, ids in ((ends - longer, before), (ends - len(after), after)):
        for number, value in enumerate(ids):
            result[positions + number] = value
            is_text[positions + number] = False
    result[is_text] = tokens
    return result, longer


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    """Number of ids, without padding of the embedding; every id is below it."""
    eod_id: int
    """The id that ends a document."""
    fingerprint: str
    """Hash of the vocabulary, stored beside corpora and checkpoints."""
    engine: str = ""
    """Library that encodes batches and its version, stored beside corpora."""
    engine_reason: str = ""
    """Why ``--tokenizer-engine auto`` could not take the faster one."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a whole document, without end-of-document."""

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of several documents, each as an integer array, by the library's fastest way."""
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]

    def encode_packed(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Ids of several documents one after the other, [tokens], and how many each has, int64 [documents]."""
        rows = self.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return (np.concatenate(rows) if rows else np.zeros(0, np.int64)), lengths

    @abstractmethod
    def decode(self, tokens: Sequence[int] | TokenArray) -> str:
        """Text of a sequence of ids. Control tokens give no text; broken UTF-8 gives U+FFFD."""

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that goes on from other text: without the blank or begin token some libraries put first."""
        anchor = self.encode(_ANCHOR)
        joined = self.encode(_ANCHOR + text)
        return joined[len(anchor) :] if joined[: len(anchor)] == anchor else self.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a prompt of messages (``role``, ``content``), up to where the answer begins.

        A last message of the assistant is what the answer goes on from. Without a chat format the texts stand one below
        the other.
        """
        return self.encode("\n".join(message["content"] for message in messages))

    def decode_continuation(
        self, context: Sequence[int] | TokenArray, tokens: Sequence[int] | TokenArray, num_context_tokens: int = 8
    ) -> str:
        """Text of ``tokens`` as it reads after ``context``: keeps the blank that decoding alone would drop."""
        tail = [int(token) for token in context[-num_context_tokens:]]
        if not tail:
            return self.decode(tokens)
        head = self.decode(tail)
        whole = self.decode(tail + [int(token) for token in tokens])
        return whole[len(head) :] if whole.startswith(head) else self.decode(tokens)
