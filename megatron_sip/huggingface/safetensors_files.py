"""Reads and writes safetensors a tensor at a time.

The format is an 8-byte length, a JSON header with type, shape and byte range of each tensor, and the bytes. The library
maps whole files into memory, where every page that was read counts as the process's own; plain reads do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_sip.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes of tensors by name, in the order in which they are written."""

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""


def open_model(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory by name, from one file or from shards with an index.

    Raises:
        CheckpointError: a file is missing, cut off or not safetensors.
    """
    if (directory / INDEX).is_file():
        return _open_shards(directory)
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    pickled = any(directory.glob("pytorch_model*.bin"))
    raise CheckpointError(
        f"{directory} has neither {SINGLE} nor {INDEX}"
        + (", only pickled weights: save them again with save_pretrained" if pickled else ": correct the path.")
    )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: it cannot be read, is cut off, or holds a type other than float32, bfloat16 and float16.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is not a safetensors file: download it again.")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): download it again.") from error


def read_tensor(stored: StoredTensor, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
    """A tensor, or some of its rows, in memory of its own."""
    shape = stored.shape if num_rows is None else (num_rows, *stored.shape[1:])
    tensor = torch.empty(shape, dtype=stored.dtype)
    with open(stored.path, "rb") as file:
        file.seek(stored.start + first_row * math.prod(stored.shape[1:]) * stored.dtype.itemsize)
        if tensor.numel() and file.readinto(_bytes_of(tensor)) != tensor.nbytes:
            raise CheckpointError(f"{stored.path} ended early: download it again.")
    return tensor


class FileWriter:
    """Writes one file, its tensors in an order planned before; a context manager.

    Args:
        path: of the file.
        tensors: name -> (type, shape) of its tensors, in order.
    """

    def __init__(self, path: Path, tensors: Plan) -> None:
        self._tensors = tensors
        self._waiting = list(tensors)[::-1]
        self._file = open(path, "wb")  # noqa: SIM115 (closed at exit)
        self._file.write(header_of(tensors))

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def is_complete(self) -> bool:
        """Whether all tensors are written."""
        return not self._waiting

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of the plan."""
        planned = self._waiting.pop()
        assert (name, (tensor.dtype, tuple(tensor.shape))) == (planned, self._tensors[name]), (name, planned)
        self._file.write(_bytes_of(tensor.contiguous()))

    def close(self) -> None:
        """After the last tensor."""
        assert self.is_complete, self._waiting[-1]
        self._file.close()


class ShardedWriter:
    """Writes tensors, in an order planned before, into files of at most a given size, and their index.

    Args:
        directory: an existing one.
        tensors: name -> (type, shape) of all tensors, in order.
        max_shard_bytes: a larger tensor has a file of its own.
    """

    def __init__(self, directory: Path, tensors: Plan, max_shard_bytes: int) -> None:
        self._directory = directory
        self._plans = plan_files(tensors, max_shard_bytes)
        self._waiting = list(self._plans)[::-1]
        self._file: FileWriter | None = None

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of the plan."""
        if self._file is None or self._file.is_complete:
            if self._file is not None:
                self._file.close()
            file_name = self._waiting.pop()
            self._file = FileWriter(self._directory / file_name, self._plans[file_name])
        self._file.add(name, tensor)

    def finish(self) -> None:
        """After the last tensor: the index, where there is more than one file."""
        assert self._file is not None and not self._waiting, self._waiting
        self._file.close()
        if len(self._plans) > 1:
            write_index(self._directory, self._plans)


def plan_files(tensors: Plan, max_bytes: int) -> dict[str, Plan]:
    """Which tensors go into which file, by its name: as many as fit, one at least."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, entry in tensors.items():
        if shards[-1] and filled + _num_bytes(entry) > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _num_bytes(entry)
    return dict(zip(_shard_names(len(shards)), shards, strict=True))


def write_index(directory: Path, files: Mapping[str, Plan]) -> None:
    """Says which tensor is in which of several files."""
    index = {
        "metadata": {"total_size": sum(_num_bytes(entry) for plan in files.values() for entry in plan.values())},
        "weight_map": {tensor: name for name, plan in files.items() for tensor in plan},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    path = directory / INDEX
    try:
        places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not an index of shards ({error}): download it again.") from error
    names = sorted(set(places.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(names)} shards, {missing[0]} for one: download it again."
        )
    shards = {name: read_header(directory / name) for name in names}
    absent = [tensor for tensor, name in places.items() if tensor not in shards[name]]
    if absent:
        raise CheckpointError(f"{directory / places[absent[0]]} lacks {absent[0]}, which {INDEX} says is in it.")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    dtype, shape, (start, end) = _DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} is of type {entry['dtype']}; only {', '.join(_DTYPES)} can be converted (no quantization)."
        )
    if data + end > size:
        raise CheckpointError(f"{path} has {size} bytes and {name} ends at {data + end}: download it again.")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: {name} {list(shape)} does not fill its {end - start} bytes: download it again.")
    return StoredTensor(path, dtype, shape, data + start)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _num_bytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return entry[0].itemsize * math.prod(entry[1])


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def header_of(tensors: Plan) -> bytes:
    """What stands before the bytes of a file's tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants it
    start = 0
    for name, entry in tensors.items():
        end = start + _num_bytes(entry)
        entries[name] = {"dtype": _NAMES[entry[0]], "shape": list(entry[1]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
