"""Next-token windows to micro-batches of the layout that every objective shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sip.data.samples import Window
from megatron_sip.types import RowBatch, RowLayout


def next_token_batches(
    windows: Sequence[Window],
    micro_batch_size: int,
    *,
    pad_multiple: int = 1,
    num_micro_batches: int | None = None,
    masked_eod_id: int | None = None,
) -> tuple[RowBatch, ...]:
    """Micro-batches [B, S] of windows [seq_length + 1], S = seq_length rounded up to ``pad_multiple``.

    ``pad_multiple`` is the tensor-parallel size under sequence parallelism. The last micro-batch, and whole ones up to
    ``num_micro_batches``, are filled with rows of weight and mask 0, so that all have one shape on all ranks.
    ``masked_eod_id`` takes the prediction that follows an end-of-document token out of the loss.
    """
    if not windows:
        raise ValueError("no windows: the width of the rows is unknown")
    num_needed = -(-len(windows) // micro_batch_size)
    if num_micro_batches is not None and num_micro_batches < num_needed:
        raise ValueError(f"{len(windows)} windows do not fit {num_micro_batches} micro-batches of {micro_batch_size}")
    num_rows = (num_micro_batches or num_needed) * micro_batch_size
    length = len(windows[0].tokens) - 1
    padded = -(-length // pad_multiple) * pad_multiple

    tokens = torch.zeros(num_rows, padded, dtype=torch.int64)
    targets = torch.zeros(num_rows, padded, dtype=torch.int64)
    mask = torch.zeros(num_rows, padded, dtype=torch.float32)
    weights = torch.zeros(num_rows, dtype=torch.float32)
    for row, window in enumerate(windows):
        values = torch.from_numpy(window.tokens)
        tokens[row, :length] = values[:-1]
        targets[row, :length] = values[1:]
        mask[row, :length] = 1.0
        weights[row] = 1.0
    if masked_eod_id is not None:
        mask[tokens == masked_eod_id] = 0.0
    positions = torch.arange(padded).expand(micro_batch_size, -1).contiguous()
    lengths = torch.full((micro_batch_size,), length, dtype=torch.int64)
    layout = RowLayout(prefix_block=padded, num_candidates=0, candidate_block=0)
    return tuple(
        RowBatch(
            layout=layout,
            tokens=tokens[rows],
            positions=positions,
            prefix_lengths=lengths,
            targets=targets[rows],
            sources=positions,
            mask=mask[rows],
            weights=weights[rows],
        )
        for rows in (slice(i, i + micro_batch_size) for i in range(0, num_rows, micro_batch_size))
    )
