"""A corpus in figures: lengths, samples per phase, mix of sources. The data card of tools/inspect_data.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.config import DataConfig
from megatron_sip.data.indexed import IndexedCorpus, meta_path, read_meta

_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_BAR = 40


@dataclass(frozen=True)
class CorpusCard:
    """Figures of one corpus."""

    prefix: str
    num_documents: int
    num_tokens: int
    quantiles: tuple[tuple[float, int], ...]
    """(share of documents, tokens of a document at most)."""
    num_windows: int
    """Next-token samples of one epoch."""
    num_suffixes: int
    """Prefix/suffix samples of one epoch: of the ``suffix``, ``rewrite`` and ``rollout`` phases."""
    num_documents_without_suffix: int
    """Documents too short to give one."""
    histogram: tuple[tuple[int, int], ...]
    """(tokens from this power of two to its double, documents)."""
    weight: float
    """Share of this corpus in what a run draws."""


def count_suffixes(lengths: NDArray[np.int64], config: DataConfig) -> NDArray[np.int64]:
    """Samples that each document gives in one epoch, [documents].

    A document is cut into chunks of N tokens from its start. A chunk is a suffix if ``min_prefix_length`` tokens
    precede it, and if it is whole, or the document's last one with ``min_suffix_length`` tokens at least.
    """
    n = config.suffix_length
    minimum = n if config.min_suffix_length is None else config.min_suffix_length
    if config.sample_cut == "random":
        return (lengths >= config.min_prefix_length + minimum).astype(np.int64)
    last_chunk = (lengths - minimum) // n
    first_chunk = max(1, -(-config.min_prefix_length // n))
    return np.maximum(last_chunk - first_chunk + 1, 0)


def corpus_cards(
    corpora: Sequence[IndexedCorpus], weights: Sequence[float] | None, config: DataConfig
) -> list[CorpusCard]:
    """A card for each corpus of a path option."""
    cards = []
    for number, corpus in enumerate(corpora):
        lengths = corpus.document_lengths
        suffixes = count_suffixes(lengths, config)
        powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        cards.append(
            CorpusCard(
                prefix=corpus.prefix,
                num_documents=corpus.num_documents,
                num_tokens=corpus.num_tokens,
                quantiles=tuple((q, int(np.quantile(lengths, q, method="lower"))) for q in _QUANTILES),
                num_windows=max(0, (corpus.num_tokens - 1) // config.seq_length),
                num_suffixes=int(suffixes.sum()),
                num_documents_without_suffix=int((suffixes == 0).sum()),
                histogram=tuple((2**p, int((powers == p).sum())) for p in range(int(powers.max()) + 1)),
                weight=_weight(number, corpora, weights),
            )
        )
    return cards


def _weight(number: int, corpora: Sequence[IndexedCorpus], weights: Sequence[float] | None) -> float:
    sizes = [float(corpus.num_tokens) for corpus in corpora] if weights is None else list(weights)
    return sizes[number] / sum(sizes)


def card_text(card: CorpusCard, config: DataConfig) -> str:
    """The card for a terminal."""
    most = max(count for _, count in card.histogram)
    mean = card.num_tokens / card.num_documents
    lines = [
        f"{card.prefix}",
        f"  {card.num_documents:,} documents, {card.num_tokens:,} tokens, {mean:,.0f} per document, "
        f"{100 * card.weight:.1f} % of the mix",
        "  tokens of a document: " + ", ".join(f"{100 * q:.0f} % <= {value:,}" for q, value in card.quantiles),
        f"  one epoch: {card.num_windows:,} next-token samples of {config.seq_length} tokens; {card.num_suffixes:,} "
        f"prefix/suffix samples of N = {config.suffix_length} (suffix, rewrite and rollout phases)",
        f"  {card.num_documents_without_suffix:,} documents are too short for a suffix",
        *_meta_lines(card.prefix),
    ]
    for start, count in card.histogram:
        lines.append(f"  {start:>9,} {'#' * round(_BAR * count / most):{_BAR}} {count:,}")
    return "\n".join(lines)


def _meta_lines(prefix: str) -> list[str]:
    meta = read_meta(prefix)
    if meta is None:
        return [f"  no {meta_path(prefix).name}: written by another tool, its tokenizer is not known"]
    return [
        f"  from {meta.num_text_bytes / 1e6:,.1f} MB of input, {meta.num_skipped:,} broken lines and "
        f"{meta.num_empty:,} empty documents left out; {meta.tokenizer_type}, {meta.vocab_size:,} ids"
    ]


def histogram_svg(cards: Sequence[CorpusCard]) -> str:
    """Document lengths of all corpora as one drawing: a row of bars each."""
    width, height = 640, 140
    parts = []
    for row, card in enumerate(cards):
        top = row * (height + 40)
        most = max(count for _, count in card.histogram)
        step = width / len(card.histogram)
        parts.append(f'<text x="4" y="{top + 14}" font-size="12">{_escaped(card.prefix)}: documents by tokens</text>')
        for column, (start, count) in enumerate(card.histogram):
            size = (height - 40) * count / most
            parts.append(
                f'<rect x="{column * step + 2:.1f}" y="{top + height - 14 - size:.1f}" width="{step - 4:.1f}" '
                f'height="{size:.1f}" fill="#4878a8"><title>{count} of {start} to {2 * start - 1}</title></rect>'
                f'<text x="{column * step + 2:.1f}" y="{top + height}" font-size="10">{start}</text>'
            )
    total = len(cards) * (height + 40)
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" font-family="sans-serif">'
    return f"{head}\n{body}\n</svg>\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
