"""Corpora to samples: prefix and suffix of one document, and next-token windows of the packed stream.

A *dataset* is one pass (an epoch) over corpora; a *stream* is its endless shuffled repetition, or a blend of such
streams. A stream's sample at a position depends on the position, the seed and the corpora only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from megatron_sip.data.indexed import IndexedCorpus
from megatron_sip.data.order import BlendOrder, draw, mix, permute
from megatron_sip.errors import DataError
from megatron_sip.types import IntArray, Sample


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of the packed stream of documents."""

    sample_id: int
    """Position in the run's deterministic stream of windows."""
    tokens: IntArray
    """Token ids [seq_length + 1], int64: inputs and, shifted by one, targets."""


class _Numbered(Protocol):
    """What streams yield: a frozen dataclass with a sample number."""

    @property
    def sample_id(self) -> int: ...


Item = TypeVar("Item", bound=_Numbered)
Out = TypeVar("Out", covariant=True)


class Dataset(Protocol[Out]):
    """One pass over corpora, in their own order."""

    @property
    def identity(self) -> int: ...

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int, sample_id: int) -> Out:
        """Sample ``index`` of the pass numbered ``epoch``."""
        ...


class Stream(Protocol[Out]):
    """An endless, deterministic sequence of samples."""

    @property
    def identity(self) -> int:
        """A hash of everything that the order depends on: kept in checkpoints, compared at resume."""
        ...

    @property
    def epoch_length(self) -> int: ...

    def __getitem__(self, position: int) -> Out: ...


def _identity(corpora: Sequence[IndexedCorpus], *options: int) -> int:
    sizes = [size for corpus in corpora for size in (corpus.num_documents, corpus.num_tokens)]
    return mix(*sizes, *options)


class SuffixDataset:
    """Prefix and suffix from one document (paper, section 2.1).

    ``chunk``: every document is cut into chunks of ``suffix_length`` tokens, and each chunk that has enough before it
    is a suffix once per epoch. ``random``: one cut per document and epoch, uniform over its allowed places. ``last``:
    the document's last ``suffix_length`` tokens, for documents that were cut before. The
    prefix is what precedes the suffix in the document, its last ``max_prefix_length`` tokens if it is longer.

    Raises ``DataError`` if no document is long enough.
    """

    def __init__(
        self,
        corpora: Sequence[IndexedCorpus],
        *,
        suffix_length: int,
        max_prefix_length: int,
        min_prefix_length: int = 1,
        min_suffix_length: int | None = None,
        cut: str = "chunk",
        seed: int = 0,
        first_document: int = 0,
    ) -> None:
        self._corpora = list(corpora)
        self._suffix_length = suffix_length
        self._max_prefix = max_prefix_length
        self._min_prefix = min_prefix_length
        self._min_suffix = min_suffix_length or suffix_length
        self._random = cut == "random"
        self._last = cut == "last"
        self._seed = seed
        self._first_document = first_document
        self._first_chunk = max(1, -(-min_prefix_length // suffix_length))
        lengths = np.concatenate([corpus.document_lengths for corpus in self._corpora])
        self._bounds = np.cumsum([0] + [corpus.num_documents for corpus in self._corpora])
        if self._last:
            per_document = (lengths >= min_prefix_length + suffix_length).astype(np.int64)
        elif self._random:
            per_document = (lengths >= min_prefix_length + self._min_suffix).astype(np.int64)
        else:
            per_document = (lengths - self._min_suffix) // suffix_length - self._first_chunk + 1
        self._ends = np.cumsum(np.maximum(per_document, 0))
        if not self._ends[-1]:
            self._raise_too_short(lengths)
        self.identity = _identity(
            self._corpora,
            suffix_length,
            max_prefix_length,
            min_prefix_length,
            self._min_suffix,
            int(self._random) + 2 * int(self._last),
        )

    def _raise_too_short(self, lengths: np.ndarray) -> None:
        first = self._min_prefix if self._random or self._last else self._first_chunk * self._suffix_length
        names = ", ".join(corpus.prefix for corpus in self._corpora)
        raise DataError(
            f"{names}: no document is long enough for a sample: a prefix of {first} and a suffix of {self._min_suffix} "
            f"tokens need {first + self._min_suffix}, the {len(lengths)} documents have {lengths.min()} to "
            f"{lengths.max()} (median {np.median(lengths):.0f}); lower --suffix-length or --min-prefix-length, or join "
            "documents"
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int, epoch: int, sample_id: int) -> Sample:
        """Sample ``index`` of an epoch; the cut of ``random`` depends on (seed, epoch, document)."""
        document = int(np.searchsorted(self._ends, index, side="right"))
        number = int(np.searchsorted(self._bounds, document, side="right")) - 1
        corpus, local = self._corpora[number], document - int(self._bounds[number])
        length = corpus.document_length(local)
        if self._last:
            cut = length - self._suffix_length
        elif self._random:
            cut = draw(self._min_prefix, length - self._min_suffix, self._seed, epoch, document)
        else:
            before = int(self._ends[document - 1]) if document else 0
            cut = (self._first_chunk + index - before) * self._suffix_length
        start, end = max(0, cut - self._max_prefix), min(length, cut + self._suffix_length)
        tokens = corpus.document(local, start, end - start)
        return Sample(
            sample_id=sample_id,
            document=self._first_document + document,
            prefix=tokens[: cut - start],
            suffix=tokens[cut - start :],
        )


class NextTokenDataset:
    """Windows of ``seq_length + 1`` tokens over the packed stream of documents, which share one token at their border.

    Each token but a corpus's first and a rest at its end is a target once per epoch. Raises ``DataError`` if a corpus
    is shorter than one window.
    """

    def __init__(self, corpora: Sequence[IndexedCorpus], seq_length: int) -> None:
        self._corpora = list(corpora)
        self._seq_length = seq_length
        counts = [(corpus.num_tokens - 1) // seq_length for corpus in self._corpora]
        for corpus, count in zip(self._corpora, counts, strict=True):
            if count < 1:
                raise DataError(
                    f"{corpus.prefix}: {corpus.num_tokens} tokens do not fill one window of {seq_length} + 1; lower "
                    "--seq-length or add text"
                )
        self._ends = np.cumsum(counts)
        self.identity = _identity(self._corpora, seq_length)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int, epoch: int, sample_id: int) -> Window:
        """Window ``index``, the same in every epoch."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[number - 1]) if number else 0)
        tokens = self._corpora[number].tokens(local * self._seq_length, self._seq_length + 1)
        return Window(sample_id, tokens)


class ShuffledStream(Generic[Item]):
    """A dataset again and again, every epoch in an order of its own: a function of (seed, epoch), without memory."""

    def __init__(self, dataset: Dataset[Item], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self.identity = mix(dataset.identity, seed)

    @property
    def epoch_length(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Item:
        epoch, index = divmod(position, len(self._dataset))
        return self._dataset.get(permute(index, len(self._dataset), self._seed, epoch), epoch, position)


class BlendedStream(Generic[Item]):
    """Several streams by weight, evenly interleaved; ``epoch_length`` is that of the first source to begin again."""

    def __init__(self, streams: Sequence[Stream[Item]], weights: Sequence[float]) -> None:
        if len(streams) != len(weights) or not streams or min(weights) <= 0:
            raise DataError(f"a blend of {len(streams)} corpora has the weights {list(weights)}: give a positive each")
        self._streams = list(streams)
        self._order = BlendOrder(weights)
        total = sum(weights)
        self.epoch_length = int(min(s.epoch_length * total / w for s, w in zip(streams, weights, strict=True)))
        self.identity = mix(*(stream.identity for stream in streams), *(round(w / total * 2**32) for w in weights))

    def __getitem__(self, position: int) -> Item:
        source, inner = self._order.locate(position)
        return replace(self._streams[source][inner], sample_id=position)  # type: ignore[type-var]
