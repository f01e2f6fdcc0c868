"""Which tokenizer a run uses; the names are Megatron-LM's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "NullTokenizer",
)


ENGINES = ("library", "gigatoken", "auto")
"""``auto`` is gigatoken where it is installed and can follow the tokenizer, the tokenizer's own library elsewhere."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Flags of the tokenizer. A corpus, a checkpoint and a run must agree on it: see ``Tokenizer.fingerprint``."""

    tokenizer_type: str = option(
        "SentencePieceTokenizer",
        help="Kind of tokenizer. Llama2Tokenizer is SentencePiece with a begin-of-sequence token before each document.",
        choices=TOKENIZER_TYPES,
    )
    tokenizer_model: str | None = option(
        None,
        help="SentencePiece .model file, Hugging Face name or folder, or tiktoken ranks "
        "(.tiktoken text or Megatron's .json).",
        metavar="PATH",
        also_called=("tokenizer", "tokenizer_path"),
    )
    vocab_size: int | None = option(
        None,
        help="Vocabulary before padding. NullTokenizer: number of ids without end-of-document. TikTokenizer: where to "
        "cut the vocabulary. Others: checked against the model.",
    )
    tiktoken_pattern: str = option(
        "v2", help="Regular expression that splits text for TikTokenizer.", choices=("v1", "v2")
    )
    tiktoken_num_special_tokens: int = option(1000, help="Ids kept for special tokens by TikTokenizer.")
    tiktoken_special_tokens: tuple[str, ...] | None = option(
        None, help="Special tokens of TikTokenizer; must hold </s> or <|end_of_text|>, the end of a document."
    )
    tokenizer_engine: str = option(
        "library",
        help="What tokenizes batches (preprocessing): the tokenizer's own library; gigatoken, many times as fast and "
        "compared with it (TikTokenizer v2, HuggingFaceTokenizer with a tokenizer.json); auto: gigatoken where it is "
        "installed and can.",
        choices=ENGINES,
    )

    def validate(self) -> None:
        """Raise ``ConfigurationError`` for a combination that cannot name a tokenizer."""
        if self.tokenizer_type not in TOKENIZER_TYPES:
            raise ConfigurationError(
                f"--tokenizer-type {self.tokenizer_type}: unknown; choose from {', '.join(TOKENIZER_TYPES)}"
            )
        if self.tokenizer_type == "NullTokenizer":
            if self.vocab_size is None:
                raise ConfigurationError("--tokenizer-type NullTokenizer needs --vocab-size")
        elif not self.tokenizer_model:
            raise ConfigurationError(f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigurationError(f"--vocab-size {self.vocab_size}: must be at least 1")
        if self.tiktoken_num_special_tokens < 1:
            raise ConfigurationError(
                f"--tiktoken-num-special-tokens {self.tiktoken_num_special_tokens}: must be at least 1"
            )
        if self.tokenizer_engine not in ENGINES:
            raise ConfigurationError(f"--tokenizer-engine {self.tokenizer_engine}: choose from {', '.join(ENGINES)}")
        if self.tokenizer_engine == "gigatoken" and self.tokenizer_type not in ("TikTokenizer", "HuggingFaceTokenizer"):
            raise ConfigurationError(
                f"--tokenizer-engine gigatoken: not for {self.tokenizer_type}, only for TikTokenizer and "
                "HuggingFaceTokenizer; give --tokenizer-engine library or auto"
            )
