"""Reads ``torch_dist`` checkpoints, ours and Megatron-LM's, and says what does not fit before anything is loaded.

Megatron-Core itself fills a vocabulary of another size with zeros, and reports a missing tensor from deep in torch.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint import load as load_from_storage

from megatron_sip.checkpoint.writing import COMMON_STATE
from megatron_sip.errors import CheckpointError

UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    CheckpointingException,
    CheckpointException,
)
"""What torch raises when it reads a file that is not what it should be."""

_NOT_OF_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|reference\.")

_PREFIXES = ("", "model.", "module.", "module.model.")
"""Before every key of a model, depending on the program that wrote it; Megatron-LM writes none."""


@dataclass(frozen=True)
class StoredTensors:
    """What a checkpoint's index says it holds."""

    directory: Path
    shapes: Mapping[str, tuple[int, ...]]
    objects: frozenset[str]
    """Unique keys of the objects that are not tensors."""

    def has(self, part: str) -> bool:
        """Whether there are tensors whose keys begin with ``part`` and a dot."""
        return any(key.startswith(part + ".") for key in self.shapes)

    def is_of_the_model(self, key: str) -> bool:
        """Whether a tensor is neither the optimizer's nor the reference's."""
        return not _NOT_OF_THE_MODEL.match(key)


def read_common(directory: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not sharded, from its own file or, since 0.17, from among the shards.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    path = directory / COMMON_STATE
    try:
        if path.is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
        key = ShardedObject("common_state", None, (1,), (0,)).unique_key
        state: dict[str, Any] = {key: io.BytesIO()}
        load_from_storage(state, storage_reader=FileSystemReader(directory), no_dist=True)
        blob = state[key]
        if isinstance(blob, io.BytesIO):
            blob.seek(0)
            blob = torch.load(blob, map_location="cpu", weights_only=True)
        return blob[0]
    except UNREADABLE as error:
        raise _unreadable(f"the common state of {directory}", error) from error


def read_index(directory: Path) -> StoredTensors:
    """What ``directory`` holds, without loading it.

    Raises:
        CheckpointError: the index cannot be read.
    """
    try:
        metadata = FileSystemReader(directory).read_metadata()
    except UNREADABLE as error:
        raise _unreadable(f"{directory / '.metadata'}", error) from error
    entries = metadata.state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in entries.items() if hasattr(entry, "size")}
    return StoredTensors(directory, shapes, frozenset(entries.keys() - shapes.keys()))


@dataclass(frozen=True)
class Request:
    """What this rank wants of a checkpoint, under the keys that the checkpoint uses."""

    stored: StoredTensors
    wanted: dict[str, Any]
    """Sharded items by their place in the state dict."""
    rest: dict[str, Any]
    """What needs no loading, by its place."""
    factories: dict[str, Any]
    """How to put items together that are stored in parts."""

    def keys(self) -> set[str]:
        """Keys of the wanted tensors."""
        return {item.key for item in _sharded_tensors(self.wanted)}


def request(state: dict[str, Any], stored: StoredTensors, vocab_size: int) -> Request:
    """Translates a sharded state dict, which stays as it is, and checks it against the checkpoint's index.

    Args:
        state: what the model and the optimizer want, as sharded tensors.
        stored: the checkpoint's index.
        vocab_size: number of real tokens; rows beyond are padding, and may be more or fewer in the checkpoint.

    Raises:
        CheckpointError: a tensor is missing or has another shape; names the tensor and both shapes.
    """
    wanted, rest, factories = load_preprocess(state)
    wanted, _ = extract_sharded_base(wanted)
    wanted, absent = _split_off_absent_extra_state(wanted, stored)
    merge(rest, absent)
    _rename_to(stored, wanted)
    _check_shapes(list(_sharded_tensors(wanted)), stored, vocab_size)
    return Request(stored, wanted, rest, factories)


def check_nothing_is_left(stored: StoredTensors, requested: set[str]) -> None:
    """Refuses a checkpoint whose model has more tensors than all ranks together have asked for.

    Raises:
        CheckpointError: naming them.
    """
    left = sorted(key for key in stored.shapes.keys() - requested if stored.is_of_the_model(key))
    if left:
        more = f" (and {len(left) - 3} more)" if len(left) > 3 else ""
        raise CheckpointError(
            f"{stored.directory} is of another model: it has {', '.join(left[:3])}{more}, which has no place here. "
            "Give the options of the run that wrote it, or load another checkpoint."
        )


def load_sharded(asked: Request) -> dict[str, Any]:
    """Fills the sharded tensors from a checkpoint, at whatever layout it was written. Collective.

    Returns:
        The structure of the state dict with tensors, without what was common.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        loaded = TorchDistLoadShardedStrategy().load(asked.wanted, asked.stored.directory)
    except UNREADABLE as error:
        raise _unreadable(f"the shards of {asked.stored.directory}", error) from error
    return apply_factory_merges(merge(asked.rest, loaded), asked.factories)


def _split_off_absent_extra_state(wanted: dict[str, Any], stored: StoredTensors) -> tuple[dict[str, Any], Any]:
    # Layers without FP8 keep an empty extra state, and whether it is written depends on the layer's implementation. A
    # strict load_state_dict wants the key all the same.
    absent, kept = extract_matching_values(
        wanted,
        lambda item: (
            isinstance(item, ShardedObject) and "_extra_state" in item.key and item.unique_key not in stored.objects
        ),
    )
    dict_list_map_inplace(lambda item: None, absent)
    return kept, absent


def _rename_to(stored: StoredTensors, wanted: dict[str, Any]) -> None:
    """Gives the wanted items the prefix under which the checkpoint has them."""
    keys = [item.key for item in _sharded_tensors(wanted) if not item.key.startswith("optimizer.")]
    prefix = next((p for p in _PREFIXES if keys and all(p + key in stored.shapes for key in keys)), "")
    if not prefix:
        return

    def rename(item: Any) -> Any:
        if isinstance(item, ShardedBase) and not item.key.startswith("optimizer."):
            item.key = prefix + item.key
        return item

    dict_list_map_inplace(rename, wanted)


def _sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _sharded_tensors(value)
    elif isinstance(state, list):
        for value in state:
            yield from _sharded_tensors(value)


def _check_shapes(wanted: list[ShardedTensor], stored: StoredTensors, vocab_size: int) -> None:
    problems = []
    for item in wanted:
        shape, found = tuple(item.global_shape), stored.shapes.get(item.key)
        if found is None:
            problems.append(f"{item.key} {list(shape)} is not in it")
        elif item.allow_shape_mismatch and len(found) == len(shape) and found[1:] == shape[1:]:
            if found[0] < vocab_size:
                problems.append(f"{item.key} has {found[0]} rows in it, the tokenizer has {vocab_size} tokens")
        elif found != shape:
            problems.append(f"{item.key} is {list(found)} in it and {list(shape)} here")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{stored.directory} is of another model or lacks a part: {'; '.join(problems[:3])}{more}. Load a "
            "checkpoint of this architecture; --no-load-optim leaves the optimizer's state out, --finetune all but "
            "the weights."
        )


def _unreadable(what: str, error: BaseException) -> CheckpointError:
    if isinstance(error, CheckpointException):  # holds the ranks' own errors, with their tracebacks
        error = next(iter(error.failures.values()))[0]
    line = str(error).strip().partition("\n")[0]
    return CheckpointError(
        f"{what} cannot be read ({type(error).__name__}: {line}): load another step with --ckpt-step."
    )
