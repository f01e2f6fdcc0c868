"""Negative log-likelihood of a continuation.

Shape legend: B rows, L scored positions of a row (``megatron_sip.types``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sip.types import ObjectiveTerms, RowBatch


@dataclass(frozen=True)
class SuffixNLL:
    """Likelihood of one continuation y of a prefix x, token by token.

        loss_sum = - sum_rows w * sum_t mask_t * log p(y_t | x, y_<t)

    With the original suffix as y it is the suffix-only baseline, with a rewrite or a rollout supervised fine-tuning,
    with the candidate that the judge scores highest RF-NLL (reward-filtered NLL; paper, arXiv 2601.21343). Which y it
    is, the builder of the rows decides. Unit: a valid token of a row with weight > 0.
    """

    name: str = "suffix"
    """The stream it trains: metrics are logged as ``loss/<name>``."""
    needs_reference: bool = False
    is_linear: bool = True

    def units(self, batch: RowBatch) -> float:
        """Valid tokens of the rows that teach something."""
        return count_tokens(batch)

    def __call__(self, log_probs: torch.Tensor, batch: RowBatch) -> ObjectiveTerms:
        """``log_probs``: float32 [B, L] with gradient."""
        loss_sum = masked_nll(log_probs, batch)
        count = valid_tokens(batch).sum()
        return ObjectiveTerms(loss_sum, {f"loss/{self.name}": (loss_sum.detach(), count)})


def valid_tokens(batch: RowBatch) -> torch.Tensor:
    """float32 [B, L]: 1 where a target is real and its row teaches something."""
    return batch.mask * (batch.weights > 0).to(batch.mask.dtype).unsqueeze(1)


def count_tokens(batch: RowBatch) -> float:
    """Number of valid tokens of the rows with weight > 0. Reads the tensors: cheap on the host, a sync on a GPU."""
    return float(valid_tokens(batch).sum(dtype=torch.float64))


def masked_nll(log_probs: torch.Tensor, batch: RowBatch) -> torch.Tensor:
    """Scalar: minus the weighted sum of the valid log-probs.

    Padding is selected away, not multiplied by 0: its target may lie in the padded vocabulary, where a log-prob is -inf
    and 0 * inf would be NaN.
    """
    valid = valid_tokens(batch) > 0
    picked = torch.where(valid, log_probs, torch.zeros_like(log_probs))
    return -(picked * batch.weights.unsqueeze(1)).sum()
