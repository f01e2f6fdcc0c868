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


@dataclass(frozen=True)
class NextLogits:
    """Ask for the logits that follow given positions: float32 [B, L, V / tp], -inf in padded vocabulary columns."""

    sources: torch.Tensor
    """int64 [B, L]: index in the row."""


ModelOutput = ScoreTargets | NextLogits
