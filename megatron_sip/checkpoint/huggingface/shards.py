"""Reads and writes the shards of a ``torch_dist`` checkpoint one tensor at a time.

``torch.distributed.checkpoint`` plans a whole state dict, and writes and reads it with all its tensors in memory. What
is written here has the same form: pieces as ``torch.save`` makes them, one after the other in one file, and an index.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sip.checkpoint import layout
from megatron_sip.checkpoint.reading import UNREADABLE
from megatron_sip.errors import CheckpointError

_FILE = "__0_0.distcp"
_FORMAT = "1.0.0"
"""torch's version of its index, in torch 2.9 to 2.13."""

Box = Sequence[int]


class ShardWriter:
    """Appends pieces of tensors; a context manager.

    Args:
        directory: an existing one, which receives the file and its index.
        shapes: shapes of the whole tensors by key.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._directory = directory
        self._shapes = shapes
        self._file = open(directory / _FILE, "wb")  # noqa: SIM115 (closed at exit)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, key: str, offsets: Box, piece: torch.Tensor) -> None:
        """A piece in memory of its own (a view would be written with all it is a view of), and where it begins."""
        assert piece.untyped_storage().nbytes() == piece.nbytes and piece.is_contiguous(), key
        entry = self._tensors.get(key)
        if entry is None:
            entry = TensorStorageMetadata(TensorProperties(piece.dtype), torch.Size(self._shapes[key]), [])
            self._tensors[key] = entry
        start = self._file.tell()
        try:
            torch.save(piece, self._file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            raise CheckpointError(
                f"{self._file.name}: {str(error).partition(chr(10))[0]}; nothing was written."
            ) from error
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        self._places[MetadataIndex(key, offsets)] = _StorageInfo(_FILE, start, self._file.tell() - start)

    def finish(self) -> None:
        """After the last piece: waits for the disk and writes the index and the format's name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        metadata = Metadata(
            state_dict_metadata=dict(self._tensors),
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version=_FORMAT,
        )
        (self._directory / ".metadata").write_bytes(pickle.dumps(metadata))
        layout.sync_file(self._directory / ".metadata")
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))


class ShardReader:
    """Reads parts of tensors from a checkpoint that any number of ranks has written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            metadata = FileSystemReader(directory).read_metadata()
        except UNREADABLE as error:
            raise CheckpointError(
                f"{directory / '.metadata'} cannot be read ({error}): choose another step."
            ) from error
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        entries = metadata.state_dict_metadata
        self._tensors = {key: e for key, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Box, sizes: Box) -> torch.Tensor:
        """A box of a tensor: ``sizes`` numbers along each axis, from ``offsets``.

        Raises:
            CheckpointError: a file cannot be read, or the pieces do not cover the box.
        """
        box: torch.Tensor | None = None
        covered = 0
        for chunk in self._tensors[key].chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            piece = self._load(key, chunk)[_slices(low, high, chunk.offsets)]
            covered += piece.numel()
            if list(piece.shape) == list(sizes):  # one piece is all: no second copy of a large tensor
                return piece
            if box is None:
                box = torch.empty(tuple(sizes), dtype=piece.dtype)
            box[_slices(low, high, offsets)] = piece
        if box is None or covered != box.numel():
            raise CheckpointError(f"{self._directory}: the pieces of {key} do not make it whole: choose another step.")
        return box

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        path = self._directory / place.relative_path
        try:
            with open(path, "rb") as file:
                view = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
                tensor: torch.Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise CheckpointError(f"{path}: {key} cannot be read ({error}): choose another step.") from error
        return tensor


def _slices(low: Box, high: Box, origin: Box) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
