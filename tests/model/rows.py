"""Ragged prefixes and candidates as shared-prefix rows, written apart from the package's own row builder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sip.types import RowLayout

PADDING_TOKEN = 5  # a real token: if padding leaked into a result, numbers would change


@dataclass
class Rows:
    """One micro-batch, and the separate sequences that it must be equal to."""

    layout: RowLayout
    tokens: torch.Tensor
    positions: torch.Tensor
    prefix_lengths: torch.Tensor
    targets: torch.Tensor
    sources: torch.Tensor
    coefficients: torch.Tensor
    sequences: list[list[tuple[list[int], list[int]]]]


def make_rows(seed: int, layout: RowLayout, prefix_lengths: list[int], vocab_size: int) -> Rows:
    """Random rows with ragged candidates; ``coefficients`` [B, L] are 0 on padding and weigh the loss elsewhere."""
    generator = np.random.default_rng(seed)
    rows, width, block = len(prefix_lengths), layout.prefix_block, layout.candidate_block
    tokens = np.full((rows, layout.length), PADDING_TOKEN)
    positions = np.tile(np.arange(layout.length), (rows, 1))
    targets = np.full((rows, layout.num_scored), PADDING_TOKEN)
    sources = np.zeros((rows, layout.num_scored), dtype=int)
    coefficients = np.zeros((rows, layout.num_scored), dtype=np.float32)
    sequences: list[list[tuple[list[int], list[int]]]] = []
    for row, length in enumerate(prefix_lengths):
        prefix = generator.integers(0, vocab_size, length)
        tokens[row, :length] = prefix
        sequences.append([])
        for candidate in range(layout.num_candidates):
            start, scored = width + candidate * block, candidate * block
            size = int(generator.integers(1, block + 1))
            continuation = generator.integers(0, vocab_size, size)
            tokens[row, start : start + size] = continuation
            positions[row, start : start + block] = length + np.arange(block)
            targets[row, scored : scored + size] = continuation
            sources[row, scored : scored + block] = [length - 1, *range(start, start + block - 1)]
            coefficients[row, scored : scored + size] = generator.normal(size=size)
            sequences[-1].append((prefix.tolist(), continuation.tolist()))
    as_ids: Any = lambda x: torch.from_numpy(np.asarray(x)).long()  # noqa: E731
    return Rows(
        layout, as_ids(tokens), as_ids(positions), as_ids(prefix_lengths), as_ids(targets), as_ids(sources),
        torch.from_numpy(coefficients), sequences,
    )  # fmt: skip
