"""Group-relative policy optimization.

Shape legend: B rows (one group each), C = K candidates, T width of a candidate block, L = K T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_sip.types import ObjectiveTerms, RowBatch


@dataclass(frozen=True)
class GRPO:
    """Raise the probability of the rollouts y_1..y_K of a prompt x that were rewarded above their group's mean.

        r_t  = p(y_t | x, y_<t) / p_old(y_t | x, y_<t)
        l_t  = -min(r_t A, clip(r_t, 1 - e_low, 1 + e_high) A)  [+ k * (exp(d_t) - d_t - 1),  d_t = log p_ref - log p]
        loss_sum = sum of l_t                     loss_mean "token": divided by the number of tokens
                   sum over y of mean_t l_t       "sequence": by the number of rollouts (GRPO)
                   sum over y of sum_t l_t / T    "constant": by the number of rollouts (Dr.GRPO; T = most new tokens)

    Sources: Shao et al. 2024 (arXiv 2402.03300), eq. 3 and 4; Liu et al. 2025 (arXiv 2503.20783) for "constant"; Yu et
    al. 2025 (arXiv 2503.14476) for "token" and for two clipping bounds. The advantages A are made by
    ``preference.group_advantages``. Log-probs are of the untruncated softmax at T = 1, however the rollouts were drawn.
    p_old are ``RowBatch.sampling_log_probs``; where there are none p_old is p itself: exact for a batch's
    first update.
    Unit: a token, or a rollout with at least one token, of a row with weight > 0.
    """

    loss_mean: str = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    is_linear: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    def units(self, batch: RowBatch) -> float:
        """Tokens, or rollouts, that are learned from."""
        valid = _valid(batch)
        return float((valid if self.loss_mean == "token" else valid.any(dim=2)).sum())

    def __call__(self, log_probs: torch.Tensor, batch: RowBatch) -> ObjectiveTerms:
        """``log_probs``: float32 [B, L] with gradient."""
        if batch.advantages is None:
            raise ValueError("GRPO needs RowBatch.advantages: build its rows by group_rows(..., advantages)")
        valid = _valid(batch)
        # Padding is selected away before any arithmetic: its log-prob may be -inf, and 0 * inf would be NaN.
        policy = _blocks(log_probs, valid)
        old = self._old(policy.detach(), batch, valid)
        advantages = batch.advantages.unsqueeze(2)  # [B, C, 1]
        ratios = (policy - old).exp()  # [B, C, T]
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratios * advantages, clipped * advantages)
        divergence = self._divergence(policy, batch, valid)
        if divergence is not None:
            losses = losses + self.kl_weight * divergence
        losses = torch.where(valid, losses, torch.zeros_like(losses)).double()
        loss_sum = self._sum(losses, valid)
        return ObjectiveTerms(loss_sum, self._metrics(loss_sum, ratios, clipped, advantages, divergence, valid))

    @staticmethod
    def _old(policy: torch.Tensor, batch: RowBatch, valid: torch.Tensor) -> torch.Tensor:
        if batch.sampling_log_probs is None:
            return policy
        sampled = _blocks(batch.sampling_log_probs, valid)
        return torch.where(sampled.isnan(), policy, sampled)

    def _sum(self, losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        if self.loss_mean == "token":
            return losses.sum()
        if self.loss_mean == "constant":
            return losses.sum() / losses.shape[2]
        return (losses.sum(dim=2) / valid.sum(dim=2).clamp(min=1)).sum()

    def _divergence(self, policy: torch.Tensor, batch: RowBatch, valid: torch.Tensor) -> torch.Tensor | None:
        """[B, C, T]: an estimate of KL(p || p_ref) per token that is never negative (Schulman's k3)."""
        if not self.needs_reference:
            return None
        if batch.reference_log_probs is None:
            raise ValueError("GRPO with a KL term needs RowBatch.reference_log_probs: score under the reference first")
        difference = _blocks(batch.reference_log_probs, valid) - policy
        return difference.exp() - difference - 1

    @torch.no_grad()
    def _metrics(
        self,
        loss_sum: torch.Tensor,
        ratios: torch.Tensor,
        clipped: torch.Tensor,
        advantages: torch.Tensor,
        divergence: torch.Tensor | None,
        valid: torch.Tensor,
    ) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        tokens = valid.sum()

        def total(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.where(valid, values.double(), 0.0).sum(), tokens

        # Where the bound holds the gradient back: above it for a good rollout, below it for a bad one.
        held = clipped * advantages < ratios * advantages
        count = tokens if self.loss_mean == "token" else valid.any(dim=2).sum()
        metrics = {
            "loss/grpo": (loss_sum.detach(), count),
            "grpo/ratio": total(ratios),
            "grpo/clipped": total(held),
            "grpo/kl_old": total(ratios - 1 - ratios.log()),
        }
        return metrics if divergence is None else {**metrics, "grpo/kl_reference": total(divergence)}


def _valid(batch: RowBatch) -> torch.Tensor:
    """bool [B, C, T]: real tokens of rows that teach."""
    layout = batch.layout
    real = (batch.mask > 0).view(batch.num_rows, layout.num_candidates, layout.candidate_block)
    return real & (batch.weights > 0).view(-1, 1, 1)


def _blocks(log_probs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, L] -> [B, C, T], 0 where it is not valid."""
    blocks = log_probs.view(valid.shape)
    return torch.where(valid, blocks, torch.zeros_like(blocks))
