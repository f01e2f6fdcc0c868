"""What lies between the policy that sampled a batch's rollouts and the one that learns from them.

Shape legend: B rows, L scored positions of a row (``megatron_sip.types``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_sip.objectives.nll import valid_tokens
from megatron_sip.types import Objective, ObjectiveTerms, RowBatch

_LEAST_WEIGHT = 1e-6
"""A row with weight keeps some: how many rows teach is counted before the ratio is known."""


@dataclass(frozen=True)
class AgainstSampling:
    """An objective that also measures, and if asked to corrects, how far its log-probs are from those at sampling.

        d_t = log p(y_t) now - log p(y_t) when y was sampled, over the row's sampled tokens
        metrics: mean and largest |d_t|
        with a cap C > 0: row weight *= min(C, exp(sum_t d_t))

    The weight is truncated importance sampling of whole rows (Ionides 2008, "Truncated importance sampling"). At the
    same weights in both, d is what two implementations of the same model differ by; with stale rollouts it grows.
    """

    inner: Objective
    cap: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.inner.needs_reference

    @property
    def is_linear(self) -> bool:
        """The correction's weights come from the log-probs."""
        return self.inner.is_linear and not self.cap

    def units(self, batch: RowBatch) -> float:
        """Those of the objective inside."""
        return self.inner.units(batch)

    def __call__(self, log_probs: torch.Tensor, batch: RowBatch) -> ObjectiveTerms:
        """``log_probs``: float32 [B, L] with gradient."""
        difference, known = self._difference(log_probs.detach(), batch)
        size, count = difference.abs(), known.sum()
        metrics = {
            "rollout/logprob_diff_mean": (size.sum(), count),
            "rollout/logprob_diff_max": (size.max(), (count > 0).to(size.dtype)),
        }
        if self.cap:
            ratio = difference.sum(dim=1).exp().clamp(_LEAST_WEIGHT, self.cap).to(batch.weights.dtype)  # [B]
            taught = (batch.weights > 0) & known.any(dim=1)
            metrics["rollout/importance_weight"] = (torch.where(taught, ratio, 0.0).sum().double(), taught.sum())
            batch = replace(batch, weights=batch.weights * torch.where(taught, ratio, 1.0))
        terms = self.inner(log_probs, batch)
        return replace(terms, metrics={**terms.metrics, **metrics})

    @staticmethod
    def _difference(log_probs: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [B, L], 0 where unknown, and bool [B, L]: the tokens of rollouts in rows that teach."""
        if batch.sampling_log_probs is None:
            return torch.zeros_like(log_probs, dtype=torch.float64), torch.zeros_like(log_probs, dtype=torch.bool)
        known = (valid_tokens(batch) > 0) & ~batch.sampling_log_probs.isnan()
        difference = log_probs.double() - batch.sampling_log_probs.double()
        return torch.where(known, difference, torch.zeros_like(difference)), known
