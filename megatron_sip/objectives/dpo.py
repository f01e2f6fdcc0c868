"""Online direct preference optimization.

Shape legend: B rows (one pair each), C = 2 candidates (0 chosen, 1 rejected), T width of a candidate block, L = 2 T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from megatron_sip.types import ObjectiveTerms, RowBatch

NUM_CANDIDATES = 2


@dataclass(frozen=True)
class OnlineDPO:
    """Prefer the chosen continuation y+ of a prefix x to the rejected one y-.

        m = beta * [(log p(y+|x) - log p_ref(y+|x)) - (log p(y-|x) - log p_ref(y-|x))]
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)  [+ a * (-log p(y+|x) / |y+|)]
        loss_sum = sum_rows w * loss

    Sources: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; label smoothing e: Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3; the NLL term a, per token of the chosen: Pang et al. 2024 (arXiv 2404.19733), eq. 2; pairs that
    are drawn and judged while training: Guo et al. 2024 (arXiv 2402.04792). Without a reference p_ref is 1. log p of a
    sequence is summed in float64: a float32 sum of a long one can flip the sign of a small log-ratio. Unit: a pair with
    w > 0.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    needs_reference: bool = True
    """False is the reference-free variant."""
    is_linear: bool = False

    def units(self, batch: RowBatch) -> float:
        """Pairs that teach something."""
        return float((batch.weights > 0).sum())

    def __call__(self, log_probs: torch.Tensor, batch: RowBatch) -> ObjectiveTerms:
        """``log_probs``: float32 [B, L] with gradient."""
        policy = sequence_log_probs(log_probs, batch)  # [B, 2]
        reference = self._reference(batch, policy)
        rewards = self.beta * (policy - reference)  # [B, 2]
        margins = rewards[:, 0] - rewards[:, 1]  # [B]
        losses = -(1 - self.label_smoothing) * logsigmoid(margins) - self.label_smoothing * logsigmoid(-margins)
        nll = -policy[:, 0] / chosen_lengths(batch)
        if self.nll_weight:
            losses = losses + self.nll_weight * nll
        valid = batch.weights > 0
        # Selected, not multiplied by 0: a row that teaches nothing may hold anything, NaN included.
        losses = torch.where(valid, losses * batch.weights.double(), torch.zeros_like(losses))
        loss_sum = losses.sum()
        return ObjectiveTerms(loss_sum, self._metrics(loss_sum, policy, rewards, margins, nll, valid))

    def _reference(self, batch: RowBatch, policy: torch.Tensor) -> torch.Tensor:
        if not self.needs_reference:
            return torch.zeros_like(policy)
        if batch.reference_log_probs is None:
            raise ValueError("online DPO needs RowBatch.reference_log_probs: score the batch under the reference first")
        return sequence_log_probs(batch.reference_log_probs, batch)

    @staticmethod
    @torch.no_grad()
    def _metrics(
        loss_sum: torch.Tensor,
        policy: torch.Tensor,
        rewards: torch.Tensor,
        margins: torch.Tensor,
        nll: torch.Tensor,
        valid: torch.Tensor,
    ) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        count = valid.sum()

        def total(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.where(valid, values.double(), 0.0).sum(), count

        return {
            "loss/dpo": (loss_sum.detach(), count),
            "rewards/chosen": total(rewards[:, 0]),
            "rewards/rejected": total(rewards[:, 1]),
            "rewards/margins": total(margins),
            "rewards/accuracies": total(margins > 0),
            "logps/chosen": total(policy[:, 0]),
            "logps/rejected": total(policy[:, 1]),
            "nll/chosen": total(nll),
        }


def sequence_log_probs(log_probs: torch.Tensor, batch: RowBatch) -> torch.Tensor:
    """float64 [B, 2]: log-prob of each candidate, summed over its valid tokens."""
    split = _split(log_probs, batch).double()
    valid = _split(batch.mask, batch) > 0
    return torch.where(valid, split, torch.zeros_like(split)).sum(dim=-1)


def chosen_lengths(batch: RowBatch) -> torch.Tensor:
    """float64 [B]: valid tokens of the chosen candidate, at least 1."""
    return _split(batch.mask, batch)[:, 0].double().sum(dim=-1).clamp(min=1)


def _split(values: torch.Tensor, batch: RowBatch) -> torch.Tensor:
    """[B, L] -> [B, 2, T]."""
    layout = batch.layout
    if layout.num_candidates != NUM_CANDIDATES:
        raise ValueError(f"a DPO row holds 2 candidates (chosen, rejected), this one {layout.num_candidates}")
    return values.reshape(values.shape[0], NUM_CANDIDATES, layout.candidate_block)
