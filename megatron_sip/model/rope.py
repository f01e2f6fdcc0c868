"""Rotary position embeddings for rows whose positions restart.

Megatron-Core's own module takes only a sequence length and ignores position ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_sip.model.presets import Architecture, RopeScaling


def inverse_frequencies(architecture: Architecture, device: torch.device) -> torch.Tensor:
    """Radians per position, float32 [d / 2] (Su et al. 2021; stretched as in Llama 3.1 if the architecture says so)."""
    width = architecture.kv_channels
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / architecture.rotary_base**exponents
    if architecture.rope_scaling is not None:
        frequencies = _stretch(frequencies, architecture.rope_scaling)
    return frequencies


def _stretch(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    length = scaling.original_max_position_embeddings
    turns = length * frequencies / (2 * math.pi)  # full turns within the original length
    # 0 at or below low_freq_factor turns (slowed in full), 1 at or above high_freq_factor turns (left alone).
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


@dataclass(frozen=True)
class Rotation:
    """What all layers of a pass turn queries and keys by, computed once per pass."""

    cosines: torch.Tensor
    """[s, b, 1, d / 2], in the model's precision."""
    sines: torch.Tensor
    """[s, b, 1, d / 2]."""


def rotation_of(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> Rotation:
    """Positions int64 [b, s], frequencies float32 [d / 2]; angles are float32."""
    angles = (positions.t().to(torch.float32)[..., None] * frequencies).unsqueeze(2)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
