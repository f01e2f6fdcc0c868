"""From options to checked corpora and streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.data.config import DataConfig, parse_blend
from megatron_sip.data.indexed import IndexedCorpus, open_indexed
from megatron_sip.data.loader import SampleLoader
from megatron_sip.data.order import mix
from megatron_sip.data.samples import (
    BlendedStream,
    Dataset,
    Item,
    NextTokenDataset,
    ShuffledStream,
    Stream,
    SuffixDataset,
)
from megatron_sip.errors import ConfigurationError
from megatron_sip.tokenizer import Tokenizer

NEXT_TOKEN = "ntp"
SUFFIX = "sip"


def open_corpora(values: Sequence[str], tokenizer: Tokenizer, flag: str = "--data-path") -> list[IndexedCorpus]:
    """The corpora of a path option, each checked against the tokenizer; weights are read over."""
    paths, _ = parse_blend(values, flag)
    if not paths:
        raise ConfigurationError(f"{flag} is missing: name at least one corpus (path without .bin)")
    return [open_indexed(path, tokenizer.vocab_size, tokenizer.fingerprint) for path in paths]


def build_loader(
    config: DataConfig,
    values: Sequence[str],
    tokenizer: Tokenizer,
    seed: int,
    names: Sequence[str] = (NEXT_TOKEN, SUFFIX),
) -> SampleLoader:
    """Streams ``ntp`` (``Window``) and ``sip`` (``Sample``) over the corpora of one path option, those in ``names``.

    ``seed`` is the run's; ``config.data_seed`` goes before it. Raises ``ConfigurationError`` and ``DataError``.
    """
    corpora = open_corpora(values, tokenizer)
    weights = parse_blend(values)[1]
    order_seed = seed if config.data_seed is None else config.data_seed

    def suffixes(part: Sequence[IndexedCorpus], first_document: int) -> Dataset[Any]:
        return SuffixDataset(
            part,
            suffix_length=config.suffix_length,
            max_prefix_length=config.max_prefix_length,
            min_prefix_length=config.min_prefix_length,
            min_suffix_length=config.min_suffix_length,
            cut=config.sample_cut,
            seed=order_seed,
            first_document=first_document,
        )

    def windows(part: Sequence[IndexedCorpus], first_document: int) -> Dataset[Any]:
        return NextTokenDataset(part, config.seq_length)

    streams: dict[str, Stream[Any]] = {}
    if NEXT_TOKEN in names:
        streams[NEXT_TOKEN] = _stream(corpora, weights, windows, mix(order_seed, 0))
    if SUFFIX in names:
        streams[SUFFIX] = _stream(corpora, weights, suffixes, mix(order_seed, 1))
    return SampleLoader(streams, _settings(config, corpora, weights, order_seed))


def _settings(
    config: DataConfig, corpora: Sequence[IndexedCorpus], weights: Sequence[float] | None, order_seed: int
) -> dict[str, str]:
    """Flag -> value of whatever decides which samples come in which order. A corpus may move: its name and size."""
    described = [f"{Path(c.prefix).name} ({c.num_documents:,} documents, {c.num_tokens:,} tokens)" for c in corpora]
    if weights is not None:
        described = [f"{weight:g} {corpus}" for weight, corpus in zip(weights, described, strict=True)]
    return {
        "--data-path": " + ".join(described),
        "--seq-length": str(config.seq_length),
        "--suffix-length": str(config.suffix_length),
        "--min-prefix-length": str(config.min_prefix_length),
        "--min-suffix-length": str(config.min_suffix_length or config.suffix_length),
        "--sample-cut": config.sample_cut,
        "the seed (--data-seed, else --seed)": str(order_seed),
    }


def _stream(
    corpora: Sequence[IndexedCorpus],
    weights: Sequence[float] | None,
    dataset: Callable[[Sequence[IndexedCorpus], int], Dataset[Item]],
    seed: int,
) -> Stream[Item]:
    if weights is None:
        return ShuffledStream(dataset(corpora, 0), seed)
    streams: list[Stream[Item]] = []
    first_document = 0
    for number, corpus in enumerate(corpora):
        streams.append(ShuffledStream(dataset([corpus], first_document), mix(seed, number)))
        first_document += corpus.num_documents
    return BlendedStream(streams, weights)
