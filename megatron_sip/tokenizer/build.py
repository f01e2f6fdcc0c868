"""From a ``TokenizerConfig`` to a ``Tokenizer``."""

from __future__ import annotations

from megatron_sip.errors import DataError
from megatron_sip.tokenizer.backends import (
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    TikTokenizer,
)
from megatron_sip.tokenizer.base import Tokenizer
from megatron_sip.tokenizer.config import TokenizerConfig
from megatron_sip.tokenizer.fast import EngineUnavailable, FastTokenizer, fast_hugging_face, fast_tiktoken


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a run. Raises ``ConfigurationError`` or ``DataError``."""
    config.validate()
    library = _library(config)
    can_be_faster = isinstance(library, TikTokenizer | HuggingFaceTokenizer)
    if config.tokenizer_engine == "library" or (config.tokenizer_engine == "auto" and not can_be_faster):
        return library
    try:
        return _fast(library, config)
    except EngineUnavailable as reason:
        if config.tokenizer_engine == "auto":
            library.engine_reason = reason.reason
            return library
        raise


def _library(config: TokenizerConfig) -> Tokenizer:
    model = config.tokenizer_model or ""
    if config.tokenizer_type == "NullTokenizer":
        return NullTokenizer(config.vocab_size or 0)
    if config.tokenizer_type == "TikTokenizer":
        return TikTokenizer(
            model,
            config.tiktoken_pattern,
            config.tiktoken_num_special_tokens,
            config.tiktoken_special_tokens,
            config.vocab_size,
        )
    tokenizer: Tokenizer
    if config.tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = HuggingFaceTokenizer(model)
    else:
        tokenizer = SentencePieceTokenizer(model, add_bos=config.tokenizer_type == "Llama2Tokenizer")
    if config.vocab_size is not None and config.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"--vocab-size {config.vocab_size} (given, or the recipe's): {model} has {tokenizer.vocab_size} tokens; "
            f"give --vocab-size {tokenizer.vocab_size} to train with it, or the tokenizer that belongs to the run"
        )
    return tokenizer


def _fast(library: Tokenizer, config: TokenizerConfig) -> FastTokenizer:
    """Raises ``EngineUnavailable``."""
    if isinstance(library, TikTokenizer):
        return fast_tiktoken(library, library.pieces, library.first_rank, config.tiktoken_pattern)
    if isinstance(library, HuggingFaceTokenizer):
        if library.definition is None:
            raise EngineUnavailable(f"{config.tokenizer_model} has no tokenizer.json that it can follow")
        return fast_hugging_face(library, library.definition)
    raise EngineUnavailable(f"not for {config.tokenizer_type}")
