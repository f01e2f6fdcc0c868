"""From a ``TokenizerConfig`` to a ``Tokenizer``."""

from __future__ import annotations

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.tokenizer.backends import (
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    TikTokenizer,
)
from megatron_sip.tokenizer.base import Tokenizer
from megatron_sip.tokenizer.config import TokenizerConfig
from megatron_sip.tokenizer.fast import fast_hugging_face, fast_tiktoken


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a run. Raises ``ConfigurationError`` or ``DataError``."""
    config.validate()
    model = config.tokenizer_model or ""
    tokenizer: Tokenizer
    if config.tokenizer_type == "NullTokenizer":
        return NullTokenizer(config.vocab_size or 0)
    if config.tokenizer_type == "TikTokenizer":
        ranks = TikTokenizer(
            model,
            config.tiktoken_pattern,
            config.tiktoken_num_special_tokens,
            config.tiktoken_special_tokens,
            config.vocab_size,
        )
        if config.tokenizer_engine == "gigatoken":
            return fast_tiktoken(ranks, ranks.pieces, ranks.first_rank, config.tiktoken_pattern)
        return ranks
    if config.tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = HuggingFaceTokenizer(model)
    else:
        tokenizer = SentencePieceTokenizer(model, add_bos=config.tokenizer_type == "Llama2Tokenizer")
    if config.vocab_size is not None and config.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"--vocab-size {config.vocab_size}: {model} has {tokenizer.vocab_size} tokens; leave the flag out, or "
            "give the model that belongs to the run"
        )
    if config.tokenizer_engine == "gigatoken":
        definition = tokenizer.definition if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if definition is None:
            raise ConfigurationError(
                f"--tokenizer-engine gigatoken: {model} has no tokenizer.json that it can follow; leave the engine out"
            )
        return fast_hugging_face(tokenizer, definition)
    return tokenizer
