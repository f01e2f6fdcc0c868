"""Next-token prediction, the ordinary pretraining loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sip.objectives.nll import count_tokens, masked_nll, valid_tokens
from megatron_sip.types import ObjectiveTerms, RowBatch


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of every token given those before it (rows without candidates, L = S).

        loss_sum = - sum_rows w * sum_t mask_t * log p(x_t | x_<t)

    Source: Bengio et al., "A Neural Probabilistic Language Model", 2003, eq. 1; the paper's
    baseline. Unit: a valid token.
    """

    metric: str = "lm loss"
    """Megatron's name for it; validation logs the same objective as ``lm loss validation``."""
    needs_reference: bool = False
    is_linear: bool = True

    def units(self, batch: RowBatch) -> float:
        """Valid tokens of the rows that teach something."""
        return count_tokens(batch)

    def __call__(self, log_probs: torch.Tensor, batch: RowBatch) -> ObjectiveTerms:
        """``log_probs``: float32 [B, L] with gradient."""
        loss_sum = masked_nll(log_probs, batch)
        return ObjectiveTerms(loss_sum, {self.metric: (loss_sum.detach(), valid_tokens(batch).sum())})
