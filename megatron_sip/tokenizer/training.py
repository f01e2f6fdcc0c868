"""Trains a SentencePiece BPE vocabulary on jsonl text."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_sip.errors import DataError


def training_lines(inputs: Sequence[Path], json_key: str, max_bytes: int) -> Iterator[str]:
    """Lines of the documents' texts, of at most ``max_bytes`` in all: every k-th document of a larger input.

    Raises ``DataError`` with file and line for a document that cannot be read.
    """
    total = sum(path.stat().st_size for path in inputs)
    step = max(1, -(-total // max_bytes))
    for path in inputs:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if (number - 1) % step or not line.strip():
                    continue
                try:
                    text = json.loads(line)[json_key]
                    yield from (part for part in text.splitlines() if part.strip())
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise DataError(f"{path}:{number}: no document with text in {json_key!r} ({error!r})") from error


def train_sentencepiece(
    inputs: Sequence[Path],
    output: Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    max_bytes: int = 10_000_000,
    num_threads: int = 2,
) -> int:
    """Write a BPE model with byte fallback; return its number of ids. The same text gives the same file.

    Nothing is normalized and no blank is put before a text, so that decoding gives back every text exactly and
    continuations join their prefixes. Ids: 0 unknown, 1 ``<s>``, 2 ``</s>`` (end of document).
    Raises ``DataError`` if there is no text or too little for the vocabulary.
    """
    import sentencepiece

    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    lines = list(training_lines(inputs, json_key, max_bytes))
    if not lines:
        raise DataError(f"{', '.join(map(str, inputs))}: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Lines are trained on one by one, so that the break between them must be given as a piece.
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 16,
            shuffle_input_sentence=False,
            num_threads=num_threads,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise DataError(f"--vocab-size {vocab_size}: SentencePiece cannot train it on this text: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, output)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return int(processor.get_piece_size())
