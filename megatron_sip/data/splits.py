"""Splits without overlap: by a stable hash, and a proof that no document and no near copy is in two of them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.records import Record, lookup
from megatron_sip.errors import ConfigurationError

Hashes = NDArray[np.uint64]


def text_hash(text: str) -> str:
    """128 bits of a text as 32 hexadecimal digits; case and white space do not count."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).hexdigest()


def document_key(record: Record, key: str) -> str:
    """What decides on a document's split: the hash of its text, or a field. Raises ``ValueError`` without the field."""
    return text_hash(record.texts[0]) if key == "text" else str(lookup(record.fields, key))


def split_of(key: str, shares: Mapping[str, float]) -> str:
    """The split of a document: a function of its key alone, whatever else is in the corpus."""
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    total = sum(shares.values())
    for name, share in shares.items():
        fraction -= share / total
        if fraction < 0:
            return name
    return list(shares)[-1]


def parse_shares(text: str) -> dict[str, float]:
    """``policy:0.5,judge:0.2`` to shares. Raises ``ConfigurationError``."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition(":")
        try:
            number = float(share)
        except ValueError:
            raise ConfigurationError(f"--splits {text}: {item!r} is not name:share") from None
        if name.strip() in shares:
            raise ConfigurationError(f"--splits {text}: {name.strip()!r} is named twice")
        shares[name.strip()] = number
    if not all(0 < share < float("inf") and name for name, share in shares.items()):
        raise ConfigurationError(f"--splits {text}: every split needs a name and a share above 0")
    return shares


def ngram_hashes(text: str, n: int, rate: float = 1.0) -> Hashes:
    """Distinct hashes of a text's n-grams of words, those below ``rate`` of the range; a shorter text is one n-gram."""
    words = np.array([zlib.crc32(word.encode()) for word in text.lower().split()], dtype=np.uint64)
    if not len(words):
        return words
    width = min(n, len(words))
    with np.errstate(over="ignore"):
        grams = np.zeros(len(words) - width + 1, dtype=np.uint64)
        for position in range(width):
            grams = grams * np.uint64(0x9E3779B97F4A7C15) + _mixed(words[position : position + len(grams)])
        grams = np.unique(_mixed(grams))
    return grams if rate >= 1 else grams[grams < np.uint64(rate * 2**64)]


def _mixed(values: Hashes) -> Hashes:
    """SplitMix64's finalizer."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class OverlapDocument:
    """A document that another split holds too."""

    split: str
    name: str
    """File and line."""
    text_hash: str
    is_exact: bool
    share: float
    """Part of its n-grams that documents of other splits have."""


@dataclass
class OverlapReport:
    """What the proof found. The proof holds if ``overlapping`` is empty."""

    num_documents: dict[str, int] = field(default_factory=dict)
    num_hashes: int = 0
    num_unsampled: int = 0
    """Documents none of whose n-grams fell into the sample: compared by their exact hash only."""
    overlapping: list[OverlapDocument] = field(default_factory=list)
    exclusions: dict[str, list[str]] = field(default_factory=dict)
    """Per split, text hashes whose removal mends it: of an exact or near pair, the document of the later split."""


class OverlapSearch:
    """Collects documents of all splits, then compares. Memory: about 12 bytes per sampled n-gram, 100 per document."""

    def __init__(self, n: int = 8, rate: float = 1.0, threshold: float = 0.5) -> None:
        if n < 1 or not 0 < rate <= 1 or not 0 < threshold <= 1:
            raise ConfigurationError(f"--ngram {n} --sample-rate {rate} --threshold {threshold}: give >= 1, 0..1, 0..1")
        self._n, self._rate, self._threshold = n, rate, threshold
        self._splits: list[str] = []
        self._split_of: list[int] = []
        self._names: list[str] = []
        self._texts: list[str] = []
        self._hashes: list[Hashes] = []

    def add(self, split: str, name: str, text: str) -> None:
        """Take in a document."""
        if split not in self._splits:
            self._splits.append(split)
        self._split_of.append(self._splits.index(split))
        self._names.append(name)
        self._texts.append(text_hash(text))
        self._hashes.append(ngram_hashes(text, self._n, self._rate))

    def report(self) -> OverlapReport:
        """Compare everything with everything else."""
        splits = np.array(self._split_of, dtype=np.int64)
        kept = np.ones(len(splits), dtype=bool)
        exact = self._exact_copies(splits)
        shares = self._shares(splits, kept, earlier_only=False)
        found = exact | (shares >= self._threshold)
        # First the later one of each pair goes, then what still overlaps with any split that is left.
        kept &= ~(self._exact_copies(splits, later_only=True) | (self._shares(splits, kept, True) >= self._threshold))
        kept &= ~(self._shares(splits, kept, False) >= self._threshold)
        return OverlapReport(
            num_documents={name: int((splits == number).sum()) for number, name in enumerate(self._splits)},
            num_hashes=sum(map(len, self._hashes)),
            num_unsampled=sum(not len(hashes) for hashes in self._hashes),
            overlapping=[
                OverlapDocument(
                    self._splits[splits[i]], self._names[i], self._texts[i], bool(exact[i]), float(shares[i])
                )
                for i in np.flatnonzero(found)
            ],
            exclusions={
                name: sorted({self._texts[i] for i in np.flatnonzero(~kept & (splits == number))})
                for number, name in enumerate(self._splits)
            },
        )

    def _exact_copies(self, splits: NDArray[np.int64], later_only: bool = False) -> NDArray[np.bool_]:
        places: dict[str, set[int]] = {}
        for text, split in zip(self._texts, splits.tolist(), strict=True):
            places.setdefault(text, set()).add(split)
        return np.array(
            [
                len(places[text]) > 1 and (not later_only or split > min(places[text]))
                for text, split in zip(self._texts, splits.tolist(), strict=True)
            ],
            dtype=bool,
        )

    def _shares(self, splits: NDArray[np.int64], kept: NDArray[np.bool_], earlier_only: bool) -> NDArray[np.float64]:
        """Part of each document's n-grams that kept documents of other (earlier) splits have, [documents]."""
        sizes = np.array([len(hashes) for hashes in self._hashes], dtype=np.int64)
        shares = np.zeros(len(sizes))
        if not sizes.sum():
            return shares
        documents = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        values, groups = np.unique(np.concatenate(self._hashes), return_inverse=True)
        valid = kept[documents]
        entry_splits = np.where(valid, splits[documents], -1)
        first = np.full(len(values), len(self._splits), dtype=np.int64)
        last = np.full(len(values), -1, dtype=np.int64)
        np.minimum.at(first, groups[valid], entry_splits[valid])
        np.maximum.at(last, groups[valid], entry_splits[valid])
        shared = first[groups] < entry_splits
        if not earlier_only:
            shared |= last[groups] > entry_splits
        counts = np.bincount(documents, weights=shared & valid, minlength=len(sizes))
        np.divide(counts, sizes, out=shares, where=sizes > 0)
        return shares


def search_overlap(documents: Iterable[tuple[str, str, str]], n: int, rate: float, threshold: float) -> OverlapReport:
    """The proof over (split, name, text) triples."""
    search = OverlapSearch(n, rate, threshold)
    for split, name, text in documents:
        search.add(split, name, text)
    return search.report()
