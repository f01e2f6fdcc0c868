"""A fixed stream of next-token, RF-NLL and DPO rows, and the same as plain sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sip.types import RowBatch, RowLayout

VOCAB = 61
NTP_LAYOUT = RowLayout(16, 0, 0)
SUFFIX_LAYOUT = RowLayout(10, 1, 6)
PAIR_LAYOUT = RowLayout(8, 2, 6)


@dataclass(frozen=True)
class Row:
    """A prefix and its continuations (none for next-token rows); weight 0 is a tie."""

    prefix: list[int]
    continuations: list[list[int]]
    weight: float = 1.0


def draw_rows(step: int, layout: RowLayout) -> list[Row]:
    """The rows of one stream at one step: prefixes and continuations of all lengths, the last pair a tie.

    Odd steps have twice the next-token rows, and every fourth has no RF-NLL rows: with overlapped reductions Megatron
    learns in the first step how often a gradient is added to, and steps that are all alike would hide that this is no
    constant.
    """
    if step % 4 == 3 and layout == SUFFIX_LAYOUT:
        return []
    generator = np.random.default_rng([step, layout.prefix_block, layout.num_candidates])
    if not layout.num_candidates:
        lengths = [layout.prefix_block - number for number in range(8 if step % 2 else 4)]
        return [Row(generator.integers(VOCAB, size=length).tolist(), []) for length in lengths]
    rows = []
    for number in range(4):
        prefix = generator.integers(VOCAB, size=generator.integers(1, layout.prefix_block + 1)).tolist()
        lengths = generator.integers(1, layout.candidate_block + 1, size=layout.num_candidates).tolist()
        continuations = [generator.integers(VOCAB, size=length).tolist() for length in lengths]
        tie = layout.num_candidates == 2 and number == 3
        rows.append(Row(prefix, continuations, weight=0.0 if tie else 1.0))
    return rows


def micro_batches(rows: Sequence[Row], layout: RowLayout, size: int) -> tuple[RowBatch, ...]:
    """Rows in the shared-prefix layout, ``size`` to a micro-batch."""
    return tuple(_batch(rows[start : start + size], layout) for start in range(0, len(rows), size))


def _batch(rows: Sequence[Row], layout: RowLayout) -> RowBatch:
    count, block = len(rows), layout.candidate_block
    tokens = torch.zeros(count, layout.length, dtype=torch.int64)
    positions = torch.zeros(count, layout.length, dtype=torch.int64)
    targets = torch.zeros(count, layout.num_scored, dtype=torch.int64)
    sources = torch.zeros(count, layout.num_scored, dtype=torch.int64)
    mask = torch.zeros(count, layout.num_scored)
    for number, row in enumerate(rows):
        width = len(row.prefix)
        tokens[number, :width] = torch.tensor(row.prefix)
        positions[number, : layout.prefix_block] = torch.arange(layout.prefix_block)
        if not row.continuations:
            targets[number, : width - 1] = torch.tensor(row.prefix[1:], dtype=torch.int64)
            sources[number] = torch.arange(layout.prefix_block)
            mask[number, : width - 1] = 1
        for candidate, continuation in enumerate(row.continuations):
            start, scored, length = layout.prefix_block + candidate * block, candidate * block, len(continuation)
            tokens[number, start : start + length] = torch.tensor(continuation)
            positions[number, start : start + block] = width + torch.arange(block)
            targets[number, scored : scored + length] = torch.tensor(continuation)
            sources[number, scored : scored + block] = start - 1 + torch.arange(block)
            sources[number, scored] = width - 1
            mask[number, scored : scored + length] = 1
    return RowBatch(
        layout=layout,
        tokens=tokens,
        positions=positions,
        prefix_lengths=torch.tensor([len(row.prefix) for row in rows]),
        targets=targets,
        sources=sources,
        mask=mask,
        weights=torch.tensor([row.weight for row in rows]),
    )
