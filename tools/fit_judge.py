"""Fits the embedded quality judge, an n-gram model, on a tokenized corpus that the policy is not trained on.

tools/fit_judge.py --data-path data/judge --tokenizer-model data/tokenizer.model --output data/judge.npz
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.indexed import IndexedCorpus, open_indexed, read_meta
from megatron_sip.errors import ConfigurationError, DataError, SIPError
from megatron_sip.teacher.ngram import NgramModel, fit_ngrams
from megatron_sip.tokenizer.build import build_tokenizer
from megatron_sip.tokenizer.config import TOKENIZER_TYPES, TokenizerConfig
from tools._help import HelpFormatter, Parser


def main() -> None:
    """Parse the command line, fit, save, and say what was counted."""
    arguments = _parser().parse_args()
    start = time.perf_counter()
    try:
        model = fit(arguments)
        model.save(arguments.output)
    except SIPError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {arguments.output} cannot be written ({error}): free space, or give another --output")
    grams = ", ".join(f"{len(level.keys):,} {n}-grams" for n, level in enumerate(model.levels, start=1))
    print(
        f"wrote {arguments.output}: {model.num_tokens:,} tokens counted, {grams}, vocabulary {model.vocab_size}, "
        f"fingerprint {model.fingerprint()}, {time.perf_counter() - start:.1f} s"
    )


def fit(arguments: argparse.Namespace) -> NgramModel:
    """The model of the chosen documents of all corpora."""
    if arguments.order < 1:
        raise ConfigurationError(f"--order {arguments.order}: give at least 1 (4 is usual; the robust judge needs 3)")
    vocab_size, fingerprint, digits = _vocabulary(arguments)
    tokens, lengths = [], []
    for prefix in arguments.data_path:
        corpus = open_indexed(prefix, vocab_size, fingerprint)
        chosen_tokens, chosen_lengths = _documents(corpus, *arguments.documents)
        tokens.append(chosen_tokens)
        lengths.append(chosen_lengths)
    return fit_ngrams(
        np.concatenate(tokens),
        np.concatenate(lengths),
        vocab_size,
        order=arguments.order,
        tokenizer_fingerprint=fingerprint,
        dedup_window=arguments.dedup_window,
        pooled=digits,
    )


def _vocabulary(arguments: argparse.Namespace) -> tuple[int, str, list[int]]:
    """Size, fingerprint and digit tokens of the tokenizer: of the one that is named, else as the first corpus says.

    A corpus does not say which tokens are digits: then there are none.
    """
    if arguments.tokenizer_model or arguments.vocab_size:
        tokenizer = build_tokenizer(
            TokenizerConfig(
                tokenizer_type=arguments.tokenizer_type,
                tokenizer_model=arguments.tokenizer_model,
                vocab_size=arguments.vocab_size,
            )
        )
        digits = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).strip().isdigit()]
        return tokenizer.vocab_size, tokenizer.fingerprint, digits
    meta = read_meta(arguments.data_path[0])
    if meta is None:
        raise DataError(f"{arguments.data_path[0]} has no .meta.json that names its tokenizer: give --tokenizer-model")
    return meta.vocab_size, meta.tokenizer_fingerprint, []


def _documents(corpus: IndexedCorpus, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of documents ``part``, ``part + parts``, ..."""
    lengths = corpus.document_lengths
    tokens = corpus.tokens(0, corpus.num_tokens)
    chosen = np.arange(len(lengths)) % parts == part
    return tokens[np.repeat(chosen, lengths)], lengths[chosen]


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PART/PARTS with PART counted from 0, such as 0/2")
    return int(part), int(parts)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX", help="corpora, without .bin")
    parser.add_argument("--output", type=Path, required=True, metavar="NPZ", help="file to write")
    parser.add_argument("--order", type=int, default=4, help="longest n-gram [4]")
    parser.add_argument(
        "--documents",
        type=_part,
        default=(0, 1),
        metavar="PART/PARTS",
        help="every PARTS-th document from PART: judges that must not share text take 0/2 and 1/2 [all]",
    )
    parser.add_argument(
        "--dedup-window",
        type=int,
        default=16,
        metavar="TOKENS",
        help="count a token only if the last TOKENS tokens stand there for the first time; 0 counts all [16]",
    )
    parser.add_argument("--tokenizer-type", default="SentencePieceTokenizer", choices=TOKENIZER_TYPES)
    parser.add_argument("--tokenizer-model", help="of the corpus [as its .meta.json says]")
    parser.add_argument("--vocab-size", type=int, help="for NullTokenizer")
    return parser


if __name__ == "__main__":
    main()
