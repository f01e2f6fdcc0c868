"""Converts whole checkpoints, one tensor at a time, into a directory that appears only when it is complete."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_sip.checkpoint import layout
from megatron_sip.checkpoint.huggingface.megatron_side import Source, open_checkpoint
from megatron_sip.checkpoint.huggingface.names import CARRIED_DIRECTORY, DTYPE_NAMES, RECIPE
from megatron_sip.checkpoint.huggingface.shards import ShardReader, ShardWriter
from megatron_sip.checkpoint.identity import identity_of
from megatron_sip.checkpoint.writing import COMMON_STATE
from megatron_sip.errors import CheckpointError, ConfigurationError
from megatron_sip.huggingface.config_json import (
    CONFIG,
    architecture_of,
    config_of,
    read_config,
    recipe_of,
)
from megatron_sip.huggingface.correspondence import EMBEDDING, LM_HEAD, Piece, pieces, whole_shapes
from megatron_sip.huggingface.safetensors_files import (
    ShardedWriter,
    StoredTensor,
    open_model,
    read_tensor,
)
from megatron_sip.huggingface.vocabulary import Vocabulary, carry, has_tokenizer, read_vocabulary
from megatron_sip.model.presets import Architecture

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype | None] = {name: getattr(torch, name, None) for name in DTYPE_NAMES}

_BLOCK_BYTES = 256 << 20
_MAX_NAMED = 3

Check = Callable[[Path], None]
"""Looks at the complete directory before it gets its name; raises a SIPError to refuse it."""


@dataclass(frozen=True)
class Converted:
    """What came of a conversion."""

    directory: Path
    architecture: Architecture
    vocab_size: int
    """Tokens of the tokenizer."""
    vocab_rows: int
    """Rows of the embedding."""
    dtype: torch.dtype
    """Of the embedding."""
    has_tokenizer: bool


def to_megatron(source: Path, output: Path, dtype: str = "keep", check: Check | None = None) -> Converted:
    """A model directory of transformers -> a directory for --pretrained-checkpoint or --load, with a recipe.

    Peak memory: a block of 256 MiB, or the queries, keys and values of one layer twice.

    Raises:
        CheckpointError, ConfigurationError, DataError: what is wrong with the model; nothing is left behind.
    """
    config = read_config(source)
    architecture = architecture_of(config, source / CONFIG)
    rows = int(config.get("vocab_size") or 0)
    wanted = pieces(architecture, rows)
    stored = open_model(source)
    _check_model(source, stored, wanted, architecture)
    vocabulary = read_vocabulary(source, rows)
    with _complete_or_nothing(output) as partial:
        weights = partial / layout.RELEASE
        weights.mkdir()
        with ShardWriter(weights, whole_shapes(wanted)) as writer:
            for piece in wanted:
                _write_piece(writer, piece, stored, _chosen(dtype, stored[piece.sources[0][0]], source))
            writer.finish()
        _write_common(weights, architecture, vocabulary)
        carried = partial / CARRIED_DIRECTORY
        carried.mkdir()
        shutil.copyfile(source / CONFIG, carried / CONFIG)
        carry(source, carried)
        kind = _chosen(dtype, stored[wanted[0].sources[0][0]], source)
        converted = Converted(output, architecture, vocabulary.size, rows, kind, has_tokenizer(source))
        (partial / RECIPE).write_text(recipe(converted), encoding="utf-8")
        layout.write_durably(partial / layout.LATEST, layout.RELEASE + "\n")
        if check is not None:
            check(partial)
    return converted


def to_hugging_face(
    source: Path,
    output: Path,
    *,
    step: int | None = None,
    like: Path | None = None,
    dtype: str = "keep",
    vocab_rows: int | None = None,
    untie: bool = False,
    max_shard_bytes: int = 5 << 30,
    check: Check | None = None,
) -> Converted:
    """A Megatron checkpoint, ours or Megatron-LM's, of any layout -> a model directory of transformers.

    Args:
        source: what --save was, what ``to_megatron`` made, or one ``iter_*`` directory.
        output: must not exist, or be empty.
        step: the latest one if not given.
        like: a model directory whose configuration and tokenizer go along; by default what ``to_megatron``
            or the run carried.
        dtype: one of ``DTYPES``.
        vocab_rows: rows of the embedding; by default as ``like`` has them, else the tokenizer's tokens. 0: the tokens.
        untie: write a tied output layer as a tensor of its own.
        max_shard_bytes: of one safetensors file.
        check: see ``Check``.

    Raises:
        CheckpointError, ConfigurationError, DataError: what is wrong; nothing is left behind.
    """
    checkpoint = open_checkpoint(source, step)
    carried = checkpoint.directory.parent / CARRIED_DIRECTORY
    if like is None and carried.is_dir():
        like = carried
    # A run carries the tokenizer alone: its checkpoints say their architecture themselves.
    model = None if like is None or (like == carried and not (like / CONFIG).is_file()) else read_config(like)
    architecture = checkpoint.architecture(None if model is None else architecture_of(model, carried / CONFIG))
    rows = _rows_to_export(checkpoint, vocab_rows, model)
    vocabulary = Vocabulary(checkpoint.vocab_size)
    if like is not None:
        vocabulary = read_vocabulary(like, rows)
        _check_tokenizer(checkpoint, vocabulary, like)
    wanted = pieces(architecture, rows)
    checkpoint.check(whole_shapes(wanted))
    reader = ShardReader(checkpoint.directory)
    kinds = {piece.key: DTYPES[dtype] or reader.dtype(checkpoint.prefix + piece.key) for piece in wanted}
    copied = wanted[0] if untie and not architecture.untie_embeddings_and_output_weights else None
    with _complete_or_nothing(output) as partial:
        _write_model(partial, reader, checkpoint.prefix, wanted, copied, kinds, max_shard_bytes)
        values = config_of(architecture, rows, kinds[EMBEDDING], model, vocabulary.eod)
        if copied is not None:
            values["tie_word_embeddings"] = False
        (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if like is not None:
            carry(like, partial)
        if check is not None:
            check(partial)
    with_tokenizer = like is not None and has_tokenizer(like)
    return Converted(output, architecture, checkpoint.vocab_size, rows, kinds[EMBEDDING], with_tokenizer)


def _write_model(
    directory: Path,
    reader: ShardReader,
    prefix: str,
    wanted: list[Piece],
    copied: Piece | None,
    kinds: Mapping[str, torch.dtype],
    max_shard_bytes: int,
) -> None:
    """The safetensors of a model; ``copied`` is the embedding of one whose output layer is to be untied."""
    plan = {name: (kinds[piece.key], shape) for piece in wanted for name, shape in piece.sources}
    if copied is not None:
        plan[LM_HEAD] = (kinds[copied.key], copied.shape)
    with ShardedWriter(directory, plan, max_shard_bytes) as writer:
        for piece in wanted:
            tensor = reader.read(prefix + piece.key, piece.offsets, piece.sizes)
            for (name, _), part in zip(piece.sources, piece.split(tensor.reshape(piece.shape)), strict=True):
                writer.add(name, part.to(kinds[piece.key]))
        if copied is not None:
            tensor = reader.read(prefix + copied.key, copied.offsets, copied.sizes)
            writer.add(LM_HEAD, tensor.to(kinds[copied.key]))
        writer.finish()


def recipe(converted: Converted) -> str:
    """The sections of a recipe that train the converted model further."""
    tokenizer: dict[str, Any] = {}
    if converted.has_tokenizer:
        folder = converted.directory / CARRIED_DIRECTORY
        tokenizer = {"tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}}
    model = {**recipe_of(converted.architecture), "bf16": converted.dtype == torch.bfloat16}
    sections = {"model": model, **tokenizer, "checkpoint": {"pretrained_checkpoint": str(converted.directory)}}
    return yaml.safe_dump(sections, sort_keys=False)


def _write_piece(writer: ShardWriter, piece: Piece, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
    if len(piece.sources) > 1:
        parts = [read_tensor(stored[name]) for name, _ in piece.sources]
        writer.add(piece.key, piece.offsets, piece.merge(parts).to(dtype).view(piece.sizes))
        return
    tensor = stored[piece.sources[0][0]]
    row_bytes = max(1, tensor.dtype.itemsize * torch.Size(piece.shape[1:]).numel())
    block = max(1, _BLOCK_BYTES // row_bytes)
    axis = 0 if piece.layer is None else 1
    for first in range(0, piece.shape[0], block):
        rows = read_tensor(tensor, first, min(block, piece.shape[0] - first)).to(dtype)
        offsets = list(piece.offsets)
        offsets[axis] += first
        writer.add(piece.key, offsets, rows if axis == 0 else rows.unsqueeze(0))


def _chosen(dtype: str, tensor: StoredTensor, source: Path) -> torch.dtype:
    chosen = DTYPES[dtype] or tensor.dtype
    if chosen == torch.float16:
        raise ConfigurationError(
            f"{source} is in float16, which is not trained here: give --dtype bfloat16 or float32."
        )
    return chosen


def _check_model(
    source: Path, stored: Mapping[str, StoredTensor], wanted: list[Piece], architecture: Architecture
) -> None:
    shapes = {name: shape for piece in wanted for name, shape in piece.sources}
    problems = [f"{name} {list(shape)} is missing" for name, shape in shapes.items() if name not in stored]
    problems += [
        f"{name} is {list(stored[name].shape)} and not {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    tied_output = not architecture.untie_embeddings_and_output_weights
    for name in stored.keys() - shapes.keys():
        if name.endswith("rotary_emb.inv_freq") or (tied_output and name == "lm_head.weight"):
            continue  # old files hold these too; both follow from the rest
        problems.append(f"{name} {list(stored[name].shape)} has no place in it")
    if problems:
        raise CheckpointError(f"{source} does not fit its own {CONFIG}: {_some(problems)}.")


def _rows_to_export(checkpoint: Source, asked: int | None, like: Mapping[str, Any] | None) -> int:
    available = checkpoint.shapes()[EMBEDDING][0]
    rows = asked or checkpoint.vocab_size
    if asked is None and like is not None:
        rows = max(rows, min(int(like.get("vocab_size") or 0), available))
    if not checkpoint.vocab_size <= rows <= available:
        raise CheckpointError(
            f"--vocab-rows {rows}: the checkpoint has {checkpoint.vocab_size} tokens and {available} rows; give a "
            "number between them."
        )
    return rows


def _check_tokenizer(checkpoint: Source, vocabulary: Vocabulary, like: Path) -> None:
    ours, theirs = checkpoint.fingerprint, vocabulary.fingerprint
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{like} has another tokenizer ({theirs}, {vocabulary.size} tokens) than the one that "
            f"{checkpoint.directory} was trained with ({ours}, {checkpoint.vocab_size} tokens): give the directory of "
            "that one with --like."
        )


def _write_common(directory: Path, architecture: Architecture, vocabulary: Vocabulary) -> None:
    identity = identity_of(architecture, vocabulary.size, vocabulary.fingerprint).as_plain()
    torch.save({"iteration": 0, "checkpoint_version": 3.0, "identity": identity}, directory / COMMON_STATE)
    versions = {"megatron_core": importlib.metadata.version("megatron-core"), "torch": torch.__version__}
    about = {**versions, "layout": "converted from Hugging Face", "identity": identity}
    layout.write_manifest(directory, 0, about)


@contextmanager
def _complete_or_nothing(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` that takes its name at the end, or is removed with all it holds."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} exists already: name a new directory, or remove it.")
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        layout.sync_directory(partial)
        partial.replace(output)
    except OSError as error:
        raise CheckpointError(f"{error.filename or output}: {error.strerror}; nothing was written.") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _some(problems: list[str]) -> str:
    more = f" (and {len(problems) - _MAX_NAMED} more)" if len(problems) > _MAX_NAMED else ""
    return "; ".join(problems[:_MAX_NAMED]) + more
