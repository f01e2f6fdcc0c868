"""A corpus in figures: lengths, samples per phase, mix of sources. The data card of tools/inspect_data.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sip.data.config import DataConfig
from megatron_sip.data.indexed import IndexedCorpus, meta_path, read_meta
from megatron_sip.data.sources import read_sources

_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_BAR = 40
_MOST_SOURCES = 20
_LINE = 18
"""Height of a bar of the plot of sources, in its pixels."""


@dataclass(frozen=True)
class SourceCard:
    """Figures of one source of a corpus."""

    name: str
    num_documents: int
    num_tokens: int
    num_suffixes: int
    """Prefix/suffix samples of one epoch."""


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
    sources: tuple[SourceCard, ...] = ()
    """Where its documents are from, most tokens first; empty if that was not kept."""


def count_suffixes(lengths: NDArray[np.int64], config: DataConfig) -> NDArray[np.int64]:
    """Samples that each document gives in one epoch, [documents].

    A document is cut into chunks of N tokens from its start. A chunk is a suffix if ``min_prefix_length`` tokens
    precede it, and if it is whole, or the document's last one with ``min_suffix_length`` tokens at least.
    """
    n = config.suffix_length
    minimum = n if config.min_suffix_length is None else config.min_suffix_length
    if config.sample_cut == "last":
        return (lengths >= config.min_prefix_length + n).astype(np.int64)
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
                sources=_source_cards(corpus, lengths, suffixes),
            )
        )
    return cards


def _source_cards(
    corpus: IndexedCorpus, lengths: NDArray[np.int64], suffixes: NDArray[np.int64]
) -> tuple[SourceCard, ...]:
    found = read_sources(corpus.prefix, corpus.num_documents)
    if found is None:
        return ()
    sums = [
        np.bincount(found.codes, weights=values, minlength=len(found.names)).astype(np.int64).tolist()
        for values in (np.ones(len(lengths)), lengths, suffixes)
    ]
    cards = [SourceCard(*values) for values in zip(found.names, *sums, strict=True)]
    return tuple(sorted(cards, key=lambda card: (-card.num_tokens, card.name)))


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
        *_source_lines(card, config),
    ]
    for start, count in card.histogram:
        lines.append(f"  {start:>9,} {'#' * round(_BAR * count / most):{_BAR}} {count:,}")
    return "\n".join(lines)


def _shown_sources(card: CorpusCard) -> list[SourceCard]:
    """The largest ones, and all others as one."""
    shown, rest = list(card.sources[:_MOST_SOURCES]), card.sources[_MOST_SOURCES:]
    if rest:
        sums = [sum(getattr(s, name) for s in rest) for name in ("num_documents", "num_tokens", "num_suffixes")]
        shown.append(SourceCard(f"{len(rest):,} others", *sums))
    return shown


def _source_lines(card: CorpusCard, config: DataConfig) -> list[str]:
    if not card.sources:
        return ["  sources of the documents were not kept (tools/preprocess_data.py --source-field)"]
    width = max(len(source.name) for source in card.sources[:_MOST_SOURCES])
    return [
        f"  {'source':{width}}  documents        tokens         next-token  N = {config.suffix_length} samples",
        *(
            f"  {source.name:{width}} {source.num_documents:>10,} {source.num_tokens:>13,} "
            f"{100 * source.num_tokens / card.num_tokens:5.1f} % {source.num_tokens / config.seq_length:>9,.0f} "
            f"{source.num_suffixes:>14,}"
            for source in _shown_sources(card)
        ),
    ]


def _meta_lines(prefix: str) -> list[str]:
    meta = read_meta(prefix)
    if meta is None:
        return [f"  no {meta_path(prefix).name}: written by another tool, its tokenizer is not known"]
    return [
        f"  from {meta.num_text_bytes / 1e6:,.1f} MB of input, {meta.num_skipped:,} broken lines and "
        f"{meta.num_empty:,} empty documents left out; {meta.tokenizer_type}, {meta.vocab_size:,} ids"
    ]


def card_svg(cards: Sequence[CorpusCard]) -> str:
    """All corpora as one drawing: documents by their length, below it tokens and samples by source."""
    width, height, top = 640, 140, 0
    parts = []
    for card in cards:
        parts += _length_bars(card, top, width, height)
        top += height + 16
        for source in _shown_sources(card):
            parts += _source_bar(source, card, top, width)
            top += _LINE
        top += 24
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" font-family="sans-serif">'
    return f'{head}\n<rect class="paper" width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def _length_bars(card: CorpusCard, top: int, width: int, height: int) -> list[str]:
    most = max(count for _, count in card.histogram)
    step = width / len(card.histogram)
    parts = [
        f'<text x="4" y="{top + 14}" font-size="12">{_escaped(card.prefix)}: documents by tokens '
        f"({card.num_windows:,} next-token, {card.num_suffixes:,} prefix/suffix samples)</text>"
    ]
    for column, (start, count) in enumerate(card.histogram):
        size = (height - 54) * count / most
        parts.append(
            f'<rect class="length" x="{column * step + 2:.1f}" y="{top + height - 14 - size:.1f}" '
            f'width="{step - 4:.1f}" height="{size:.1f}" fill="#4878a8">'
            f"<title>{count} of {start} to {2 * start - 1}</title></rect>"
            f'<text x="{column * step + 2:.1f}" y="{top + height}" font-size="10">{start:,}</text>'
        )
        if count:
            parts.append(
                f'<text class="count" x="{(column + 0.5) * step:.1f}" y="{top + height - 17 - size:.1f}" '
                f'font-size="10" text-anchor="middle">{count:,}</text>'
            )
    return parts


def _source_bar(source: SourceCard, card: CorpusCard, top: int, width: int) -> list[str]:
    share = source.num_tokens / card.num_tokens
    name = source.name if len(source.name) <= 24 else source.name[:23] + "…"
    return [
        f'<text x="4" y="{top + 12}" font-size="11">{_escaped(name)}</text>',
        f'<rect class="source" x="160" y="{top + 2}" width="{(width - 380) * share:.1f}" height="12" fill="#a86848"/>',
        f'<text x="{168 + (width - 380) * share:.1f}" y="{top + 12}" font-size="11">{100 * share:.1f} % of tokens, '
        f"{source.num_suffixes:,} samples</text>",
    ]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
