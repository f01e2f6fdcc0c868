"""The tokenizer's flags for tools that have an argument parser of their own."""

from __future__ import annotations

import argparse

from megatron_sip.tokenizer.config import ENGINES, TOKENIZER_TYPES, TokenizerConfig


def add_tokenizer_flags(group: argparse._ArgumentGroup) -> None:
    """All of ``TokenizerConfig`` but the engine."""
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="SentencePieceTokenizer")
    group.add_argument("--tokenizer-model", help="model file, or name or folder of a Hugging Face tokenizer")
    group.add_argument("--vocab-size", type=int, help="for NullTokenizer and TikTokenizer")
    group.add_argument("--tiktoken-pattern", choices=("v1", "v2"), default="v2")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tiktoken-special-tokens", nargs="+")


def add_engine_flag(group: argparse._ArgumentGroup) -> None:
    """For tools that tokenize much text."""
    group.add_argument(
        "--tokenizer-engine", choices=ENGINES, default="library", help="gigatoken: the same ids, many times as fast"
    )


def tokenizer_config(options: argparse.Namespace) -> TokenizerConfig:
    """What the flags name."""
    special_tokens = options.tiktoken_special_tokens
    return TokenizerConfig(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_size=options.vocab_size,
        tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        tiktoken_special_tokens=tuple(special_tokens) if special_tokens else None,
        tokenizer_engine=getattr(options, "tokenizer_engine", "library"),
    )
