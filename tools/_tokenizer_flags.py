"""The flags of a tokenizer, for the tools that take no YAML."""

from __future__ import annotations

import argparse

from megatron_sip.tokenizer.config import TOKENIZER_TYPES, TokenizerConfig


def add_tokenizer_flags(group: argparse._ArgumentGroup) -> None:
    """Megatron-LM's flags."""
    group.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        default="SentencePieceTokenizer",
        help="Llama2Tokenizer: SentencePiece with a begin token before each document; NullTokenizer: numbers as text",
    )
    group.add_argument(
        "--tokenizer-model",
        help="SentencePiece .model file, name or folder of a Hugging Face tokenizer, or tiktoken ranks "
        "(.tiktoken text or Megatron's .json)",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        help="NullTokenizer: number of ids; TikTokenizer: where to cut the vocabulary; others: compared with the model",
    )
    group.add_argument(
        "--tiktoken-pattern", choices=("v1", "v2"), default="v2", help="expression by which TikTokenizer splits text"
    )
    group.add_argument(
        "--tiktoken-num-special-tokens", type=int, default=1000, help="ids that TikTokenizer keeps for special tokens"
    )
    group.add_argument(
        "--tiktoken-special-tokens",
        nargs="+",
        help="names of the first of these; </s> or <|end_of_text|> must be among them",
    )


def tokenizer_config(options: argparse.Namespace, engine: str = "library") -> TokenizerConfig:
    """What the flags name."""
    return TokenizerConfig(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_size=options.vocab_size,
        tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        tiktoken_special_tokens=tuple(options.tiktoken_special_tokens or ()) or None,
        tokenizer_engine=engine,
    )
