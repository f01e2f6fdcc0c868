"""Row batches written by hand, for the tests of objectives."""

from __future__ import annotations

import torch

from megatron_sip.types import RowBatch, RowLayout


def batch_of(
    mask: torch.Tensor,
    weights: list[float],
    num_candidates: int,
    reference_log_probs: torch.Tensor | None = None,
) -> RowBatch:
    """A batch of which only mask, weights and the reference matter: what an objective reads."""
    num_rows, num_scored = mask.shape
    block = num_scored // num_candidates if num_candidates else 0
    layout = RowLayout(
        prefix_block=1 if num_candidates else num_scored, num_candidates=num_candidates, candidate_block=block
    )
    zeros = torch.zeros(num_rows, layout.length, dtype=torch.int64)
    scored = torch.zeros(num_rows, num_scored, dtype=torch.int64)
    return RowBatch(
        layout=layout,
        tokens=zeros,
        positions=zeros,
        prefix_lengths=torch.ones(num_rows, dtype=torch.int64),
        targets=scored,
        sources=scored,
        mask=mask,
        weights=torch.tensor(weights),
        reference_log_probs=reference_log_probs,
    )
