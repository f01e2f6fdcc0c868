"""What a forward pass of the last stage is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoreTargets:
    """Ask for the log-probability of given tokens: float32 [B, L]."""

    targets: torch.Tensor
    """int64 [B, L]: the tokens to score."""
    sources: torch.Tensor
    """int64 [B, L]: index in the row of the hidden state that predicts each."""
    gradient: torch.Tensor | None = None
    """float32 [B, L]: the loss's gradient in the log-probs, if it is known before them (a loss that is linear in them).
    The output layer's backward pass then happens within its forward pass."""


@dataclass(frozen=True)
class NextLogits:
    """Ask for the logits that follow given positions: float32 [B, L, V / tp], -inf in padded vocabulary columns."""

    sources: torch.Tensor
    """int64 [B, L]: index in the row."""


ModelOutput = ScoreTargets | NextLogits
