"""SentencePiece, Hugging Face and tiktoken tokenizers behind one interface."""

from megatron_sip.tokenizer.base import Tokenizer
from megatron_sip.tokenizer.build import build_tokenizer
from megatron_sip.tokenizer.config import TokenizerConfig

__all__ = ["Tokenizer", "TokenizerConfig", "build_tokenizer"]
