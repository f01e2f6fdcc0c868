#!/usr/bin/env python
"""The data card of tokenized corpora: document lengths, samples per phase, mix of sources, and samples to read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from megatron_sip.data.build import SUFFIX, build_loader, open_corpora
from megatron_sip.data.card import card_svg, card_text, corpus_cards
from megatron_sip.data.config import SAMPLE_CUTS, DataConfig, parse_blend
from megatron_sip.data.indexed import open_as_recorded, require_files
from megatron_sip.errors import ConfigurationError
from megatron_sip.files import make_folder, write_text
from megatron_sip.tokenizer import Tokenizer, build_tokenizer
from tools._exit import one_line
from tools._help import HelpFormatter, Parser
from tools._tokenizer_flags import add_tokenizer_flags, tokenizer_config


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    defaults = DataConfig()
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--data-path", nargs="+", required=True, help="corpora, or a blend: weight path weight path ..."
    )
    parser.add_argument("--seq-length", type=int, default=defaults.seq_length, help="tokens of a window")
    parser.add_argument("--suffix-length", type=int, default=defaults.suffix_length, help="of a suffix")
    parser.add_argument("--min-prefix-length", type=int, default=defaults.min_prefix_length, help="before it")
    parser.add_argument("--min-suffix-length", type=int, help="accept this at a document's end [--suffix-length]")
    parser.add_argument("--sample-cut", choices=SAMPLE_CUTS, default=defaults.sample_cut, help="as in training")
    group = parser.add_argument_group("tokenizer")
    add_tokenizer_flags(group)
    parser.add_argument("--num-samples", type=int, default=3, help="samples to decode, 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="which samples")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw document lengths and sources")
    return parser.parse_args()


def open_tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """That of the flags; None where none is named and no sample is to be decoded."""
    is_named = options.tokenizer_model is not None or options.tokenizer_type == "NullTokenizer"
    if not is_named and not options.num_samples:
        return None
    if not is_named:
        raise ConfigurationError(
            f"--tokenizer-model is missing, to decode {options.num_samples} samples: name the corpus's own, or give "
            "--num-samples 0"
        )
    return build_tokenizer(tokenizer_config(options))


def show_samples(options: argparse.Namespace, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Decoded prefixes and suffixes, as the judged phases draw them."""
    loader = build_loader(config, options.data_path, tokenizer, options.seed, (SUFFIX,))
    for sample in loader.take(SUFFIX, options.num_samples):
        prefix = np.asarray(sample.prefix)
        print(f"\nsample {sample.sample_id}, document {sample.document}: {len(prefix)} + {len(sample.suffix)} tokens")
        print("prefix ..." + tokenizer.decode(prefix[-200:]))
        print("suffix >>>" + tokenizer.decode_continuation(prefix, sample.suffix))


def main() -> None:
    """Print the card, draw it, decode samples."""
    options = parse_arguments()
    config = DataConfig(
        data_path=tuple(options.data_path),
        seq_length=options.seq_length,
        suffix_length=options.suffix_length,
        min_prefix_length=options.min_prefix_length,
        min_suffix_length=options.min_suffix_length,
        sample_cut=options.sample_cut,
    )
    with one_line("inspect_data"):
        config.validate()
        if options.num_samples < 0:
            raise ConfigurationError(f"--num-samples {options.num_samples}: must be at least 0")
        if options.plot is not None:
            make_folder(options.plot.parent)
        paths, weights = parse_blend(options.data_path)
        for path in paths:
            require_files(path)
        tokenizer = open_tokenizer(options)
        corpora = open_corpora(options.data_path, tokenizer) if tokenizer else [open_as_recorded(p) for p in paths]
        cards = corpus_cards(corpora, weights, config)
        for card in cards:
            print(card_text(card, config))
        if options.plot is not None:
            write_text(options.plot, card_svg(cards))
        if tokenizer and options.num_samples:
            show_samples(options, config, tokenizer)


if __name__ == "__main__":
    main()
