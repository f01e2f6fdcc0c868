"""An n-gram language model with Witten-Bell smoothing on sorted int64 keys.

    p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))

h' is h without its first token, c counts, and T(h) is the number of different tokens seen after h. An unseen h passes
on to h'; below the unigrams stands the uniform distribution over the vocabulary. (Witten and Bell 1991, interpolated.)

An n-gram's key is ``index of its first n - 1 tokens among the (n - 1)-grams * vocabulary + last token``: exact for any
vocabulary, and looked up for a whole batch at once by ``numpy.searchsorted``.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.teacher.interfaces import FloatArray, IntArray

_FORMAT = 2


@dataclass(frozen=True)
class Level:
    """All n-grams of one length n, and what followed each (n - 1)-gram."""

    keys: IntArray
    """int64 [num n-grams], ascending."""
    counts: IntArray
    """int64 [num n-grams]."""
    context_totals: FloatArray
    """c(h), float64 [num (n - 1)-grams]; one entry at n = 1."""
    context_types: FloatArray
    """T(h), same shape."""

    def find(self, keys: IntArray) -> IntArray:
        """Index of each key, -1 where it is unknown; negative keys are unknown."""
        if not len(self.keys):
            return np.full(keys.shape, -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)


@dataclass(frozen=True)
class NgramModel:
    vocab_size: int
    levels: tuple[Level, ...]
    """n = 1 .. order."""
    tokenizer_fingerprint: str
    """Of the tokenizer whose ids it counts; "" if it was not told."""
    num_tokens: int
    pooled: IntArray
    """Ids of the tokens that share one unigram probability, int64 [any], ascending; see ``log_probs``."""

    @property
    def order(self) -> int:
        return len(self.levels)

    def fingerprint(self) -> str:
        """SHA-256 of the counts: names the model in the ledger."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.tokenizer_fingerprint}".encode())
        digest.update(self.pooled.tobytes())
        for level in self.levels:
            digest.update(level.keys.tobytes() + level.counts.tobytes())
        return digest.hexdigest()[:16]

    def log_probs(self, prefix: IntArray, continuations: Sequence[IntArray]) -> tuple[FloatArray, FloatArray]:
        """log p of every token given up to ``order - 1`` tokens before it, and its log unigram.

        The continuations, each after the prefix, are laid end to end: both arrays are float64 [sum of their lengths].
        A pooled token's unigram probability is that of any pooled token: each of ten digits is rare, a digit is not,
        and a judge that rewards what is rarer alone than in its context would otherwise like a run of random digits.
        """
        history = self.order - 1
        tail = np.asarray(prefix[max(0, len(prefix) - history) :], dtype=np.int64)
        pad = np.full(history - len(tail), -1, dtype=np.int64)
        rows = [np.concatenate([pad, tail, np.asarray(c, dtype=np.int64)]) for c in continuations]
        windows = [np.lib.stride_tricks.sliding_window_view(row, history + 1) for row in rows if len(row) > history]
        if not windows:
            return np.zeros(0), np.zeros(0)
        probs = self.window_probs(np.concatenate(windows))
        unigrams = probs[0]
        if len(self.pooled):
            tokens = np.concatenate([np.asarray(c, dtype=np.int64) for c in continuations])
            mass = self.window_probs(np.pad(self.pooled[:, None], ((0, 0), (history, 0)), constant_values=-1))[0].sum()
            unigrams = np.where(np.isin(tokens, self.pooled), mass, unigrams)
        return np.log(probs[-1]), np.log(unigrams)

    def window_probs(self, windows: IntArray) -> FloatArray:
        """p of the last token of each window under orders 1 .. order, float64 [order, windows].

        ``windows``: int64 [windows, order]; -1 stands for "before the document". Raises DataError for a token id beyond
        the vocabulary.
        """
        if windows.size and int(windows.max()) >= self.vocab_size:
            raise DataError(
                f"token id {int(windows.max())} is beyond the judge's vocabulary of {self.vocab_size}: fit the judge "
                "with the tokenizer of this run (tools/fit_judge.py)"
            )
        last = windows[:, -1].astype(np.int64)
        unigram = self.levels[0]
        seen = self._count(unigram, last)
        total, types = unigram.context_totals[0], unigram.context_types[0]
        probs = [(seen + types / self.vocab_size) / (total + types)]
        for length in range(2, self.order + 1):
            level = self.levels[length - 1]
            context = self._index(windows[:, -length:-1].astype(np.int64))
            known = context >= 0
            safe = np.where(known, context, 0)
            seen = self._count(level, np.where(known, safe * self.vocab_size + last, -1))
            if not len(level.context_totals):
                probs.append(probs[-1])
                continue
            total, types = level.context_totals[safe], level.context_types[safe]
            # A context that only ever ended a document has no successors: it says nothing, like an unknown one.
            known &= total > 0
            mixed = (seen + types * probs[-1]) / np.where(known, total + types, 1.0)
            probs.append(np.where(known, mixed, probs[-1]))
        return np.stack(probs)

    def ngram_counts(self, ngrams: IntArray) -> FloatArray:
        """How often each n-gram was counted, float64 [m]; ``ngrams``: int64 [m, n] with n up to the order."""
        index = self._index(ngrams.astype(np.int64))
        counts = self.levels[ngrams.shape[1] - 1].counts
        if not len(counts):
            return np.zeros(len(ngrams))
        return np.where(index >= 0, counts[np.maximum(index, 0)], 0).astype(np.float64)

    def _index(self, grams: IntArray) -> IntArray:
        """Index of each n-gram (row) among those of its length, -1 if unknown."""
        index = self.levels[0].find(grams[:, 0])
        for column in range(1, grams.shape[1]):
            token = grams[:, column]
            valid = (index >= 0) & (token >= 0)
            index = self.levels[column].find(np.where(valid, index * self.vocab_size + token, -1))
        return index

    @staticmethod
    def _count(level: Level, keys: IntArray) -> FloatArray:
        index = level.find(keys)
        if not len(level.counts):
            return np.zeros(keys.shape)
        return np.where(index >= 0, level.counts[np.maximum(index, 0)], 0).astype(np.float64)

    def save(self, path: Path) -> None:
        """Write a ``.npz``; the file is there whole or not at all."""
        arrays: dict[str, np.ndarray] = {
            "format": np.array(_FORMAT),
            "vocab_size": np.array(self.vocab_size),
            "num_tokens": np.array(self.num_tokens),
            "order": np.array(self.order),
            "tokenizer_fingerprint": np.array(self.tokenizer_fingerprint),
            "pooled": self.pooled,
        }
        for n, level in enumerate(self.levels, start=1):
            arrays[f"keys{n}"] = level.keys
            arrays[f"counts{n}"] = level.counts
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> NgramModel:
        """Raises DataError if the file is missing, broken or of another format."""
        remedy = "fit it again with tools/fit_judge.py"
        if not path.is_file():
            raise DataError(f"judge model {path} does not exist: {remedy}")
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    raise DataError(f"judge model {path} has format {int(file['format'])}, not {_FORMAT}: {remedy}")
                pairs = [(file[f"keys{n}"], file[f"counts{n}"]) for n in range(1, int(file["order"]) + 1)]
                return NgramModel(
                    vocab_size=int(file["vocab_size"]),
                    levels=_levels(pairs, int(file["vocab_size"])),
                    tokenizer_fingerprint=str(file["tokenizer_fingerprint"]),
                    num_tokens=int(file["num_tokens"]),
                    pooled=file["pooled"],
                )
        except OSError as error:
            raise DataError(f"judge model {path} cannot be read ({error.strerror or error}): {remedy}") from error
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            # NumPy takes a foreign file for a pickle, and would tell its reader to load it unsafely.
            raise DataError(f"judge model {path} is not one of ours, or is cut off: {remedy}") from error


def fit_ngrams(
    tokens: IntArray,
    document_lengths: IntArray,
    vocab_size: int,
    order: int = 4,
    tokenizer_fingerprint: str = "",
    dedup_window: int = 0,
    pooled: Sequence[int] = (),
) -> NgramModel:
    """Count n-grams up to ``order``; none crosses the end of a document.

    ``tokens``: ids of all documents end to end [n]; ``document_lengths``: int [documents], sums to n. With
    ``dedup_window`` w, a token is counted only if the w tokens that end with it have not stood in the corpus before, so
    that text which is repeated (licences, section headings) counts once. ``pooled``: tokens that share one unigram
    probability (``NgramModel.log_probs``). Raises DataError for an empty corpus or ids
    beyond the vocabulary.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    if not len(tokens):
        raise DataError("the judge's corpus is empty: give it a split with documents")
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        raise DataError(
            f"the judge's corpus has token ids {int(tokens.min())}..{int(tokens.max())}, outside the vocabulary of "
            f"{vocab_size}: use the tokenizer that wrote it"
        )
    if dedup_window and dedup_window < order:
        raise DataError(f"a dedup window of {dedup_window} is shorter than the order {order}: make it at least that")
    # Offset of each token in its document.
    lengths = np.asarray(document_lengths, dtype=np.int64)
    if int(lengths.sum()) != len(tokens):
        raise ValueError(f"document lengths sum to {int(lengths.sum())}, not to {len(tokens)} tokens")
    offset = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    counted = _first_of_window(tokens, offset, dedup_window) if dedup_window else np.ones(len(tokens))
    pairs = []
    index, keys = np.zeros(len(tokens), dtype=np.int64), tokens
    for length in range(1, order + 1):
        if length > 1:
            keys = np.concatenate([[0], index[:-1]]) * vocab_size + tokens
        valid = np.flatnonzero(offset >= length - 1)
        unique, inverse = np.unique(keys[valid], return_inverse=True)
        index = np.full(len(tokens), -1, dtype=np.int64)
        index[valid] = inverse
        counts = np.bincount(inverse, weights=counted[valid], minlength=len(unique))
        pairs.append((unique, counts.astype(np.int64)))
    return NgramModel(
        vocab_size=vocab_size,
        levels=_levels(pairs, vocab_size),
        tokenizer_fingerprint=tokenizer_fingerprint,
        num_tokens=int(counted.sum()),
        pooled=np.unique(np.asarray(pooled, dtype=np.int64)),
    )


def _levels(pairs: Sequence[tuple[IntArray, IntArray]], vocab_size: int) -> tuple[Level, ...]:
    """Keys and counts per length -> levels with the totals of their contexts."""
    levels: list[Level] = []
    for length, (keys, counts) in enumerate(pairs, start=1):
        context = keys // vocab_size if length > 1 else np.zeros(len(keys), dtype=np.int64)
        num_contexts = len(levels[-1].keys) if levels else 1
        totals = np.bincount(context, weights=counts, minlength=num_contexts)
        types = np.bincount(context, minlength=num_contexts)
        levels.append(Level(keys, counts, totals.astype(np.float64), types.astype(np.float64)))
    return tuple(levels)


def _first_of_window(tokens: IntArray, offset: IntArray, window: int) -> FloatArray:
    """1 for a token whose last ``window`` tokens (itself included) stand there for the first time, else 0."""
    if window > len(tokens):
        return np.ones(len(tokens))
    with np.errstate(over="ignore"):
        # Polynomial hash modulo 2^64, of mixed ids: small ids alone would collide.
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        value = np.zeros(len(tokens), dtype=np.uint64)
        for back in range(window):
            shifted = np.concatenate([np.zeros(back, dtype=np.uint64), mixed[: len(tokens) - back]])
            value = value * np.uint64(0xBF58476D1CE4E5B9) + shifted
    whole = np.flatnonzero(offset >= window - 1)
    _, first = np.unique(value[whole], return_index=True)
    counted = np.ones(len(tokens))
    counted[whole] = 0
    counted[whole[first]] = 1
    return counted
