"""Tensors as a stream of byte chunks, cut alike by who sends and who receives.

The cut is that of vLLM 0.32's NCCL engine (``packed_tensor.py``): a chunk ends with the tensor that takes it beyond its
size. Imported on both sides, by trainer and server: torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

Entry = tuple[str, torch.dtype, Sequence[int]]
"""Name, type and shape of a tensor."""

CHUNK_BYTES = 256 * 2**20


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Of a tensor."""
    return math.prod(shape) * dtype.itemsize


def cut(entries: Iterable[Entry], chunk_bytes: int) -> Iterator[list[Entry]]:
    """The tensors of each chunk."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        chunk.append(entry)
        size += num_bytes(entry[1], entry[2])
        if size > chunk_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def packed(tensors: Iterable[torch.Tensor], chunk_bytes: int) -> Iterator[torch.Tensor]:
    """uint8 [bytes] of each chunk, on the tensors' device."""
    parts: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        # A copy in any case: the weights' own memory may change before the chunk has left.
        parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8))
        size += parts[-1].numel()
        if size > chunk_bytes:
            yield torch.cat(parts)
            parts, size = [], 0
    if parts:
        yield torch.cat(parts)


def unpacked(chunk: torch.Tensor, entries: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors of a chunk: views of it where their type's alignment allows."""
    sizes = [num_bytes(dtype, shape) for _, dtype, shape in entries]
    for (name, dtype, shape), part in zip(entries, chunk.split(sizes), strict=True):
        aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        yield name, aligned.view(dtype).view(tuple(shape))
