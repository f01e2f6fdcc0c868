"""The tokenizer that goes with the weights: its files, its size, its fingerprint."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import CheckpointError
from megatron_sip.tokenizer import TokenizerConfig, build_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIED = (*TOKENIZER_FILES, "generation_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """What the conversion needs to know of a tokenizer."""

    size: int
    """Ids, without padding."""
    fingerprint: str = ""
    """As checkpoints carry it; "" where it is not known."""
    eod: int | None = None


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory brings one that can be loaded."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def read_vocabulary(directory: Path, rows: int) -> Vocabulary:
    """The vocabulary of a model directory whose embedding has ``rows`` rows; of that size if there is no tokenizer.

    Raises:
        CheckpointError: the tokenizer has ids beyond the embedding.
        DataError: transformers cannot load it.
    """
    if not has_tokenizer(directory):
        return Vocabulary(rows)
    if importlib.util.find_spec("transformers") is not None:
        tokenizer = build_tokenizer(TokenizerConfig("HuggingFaceTokenizer", str(directory)))
        found = Vocabulary(tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.eod_id)
    else:
        found = Vocabulary(_count_ids(directory, rows))
    if found.size > rows:
        raise CheckpointError(
            f"{directory}: its tokenizer has {found.size} tokens and its embedding {rows} rows: these belong to "
            "different models."
        )
    return found


def carry(source: Path, target: Path) -> list[str]:
    """Copies the files that go along with the weights, each at once or not at all; returns their names."""
    names = [name for name in CARRIED if (source / name).is_file()]
    for name in names:
        partial = target / f"{name}.partial"
        shutil.copyfile(source / name, partial)
        os.replace(partial, target / name)
    return names


def _count_ids(directory: Path, rows: int) -> int:
    if (directory / "tokenizer.json").is_file():
        import tokenizers

        return int(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size())
    if (directory / "tokenizer.model").is_file():
        return build_tokenizer(TokenizerConfig("SentencePieceTokenizer", str(directory / "tokenizer.model"))).vocab_size
    return rows
