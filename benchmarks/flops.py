"""What a GPU could do at best, and what a piece of work needs of it: the two sides of a fraction.

Model FLOPs are those that the result needs, as Megatron-LM counts them: recomputation (of activations, of logits) is
not counted, and of a causal score matrix one half.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.model.presets import Architecture, count_parameters


@dataclass(frozen=True)
class Peak:
    """Of one device."""

    flops_per_s: float
    """bfloat16 matrix products, dense."""
    bytes_per_s: float
    """Of its memory."""


PEAKS: dict[str, Peak] = {
    # From NVIDIA's data sheets, without sparsity. The first name that is part of the device's own counts.
    "H200": Peak(989.4e12, 4.8e12),
    "H100 NVL": Peak(835.5e12, 3.9e12),
    "H100 PCIe": Peak(756.5e12, 2.0e12),
    "H100": Peak(989.4e12, 3.35e12),  # SXM
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "A100 80GB PCIe": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 1.555e12),  # 40 GB
}


def peak_of(device_name: str) -> Peak | None:
    """None if the device is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class RowWork:
    """One row ``[prefix | C candidates of T tokens]``; a causal sequence is a prefix alone."""

    prefix: int
    num_candidates: int = 0
    candidate: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.num_candidates * self.candidate

    @property
    def scored(self) -> int:
        """Positions that pass through the output layer."""
        return self.num_candidates * self.candidate or self.prefix

    @property
    def attended(self) -> float:
        """Pairs of a query and a key that it attends to: P^2 / 2 + C (T P + T^2 / 2)."""
        p, c, t = self.prefix, self.num_candidates, self.candidate
        return p * p / 2 + c * (t * p + t * t / 2)


def forward_flops(architecture: Architecture, vocab_size: int, row: RowWork) -> float:
    """2 per token and weight of the layers, 2 per scored position and weight of the output layer, and 4 * h * d per
    layer and attended pair (scores and values); backward takes twice as many."""
    a = architecture
    output = vocab_size * a.hidden_size
    layers = count_parameters(a, vocab_size) - output * (2 if a.untie_embeddings_and_output_weights else 1)
    attention = 4.0 * a.num_layers * a.num_attention_heads * a.kv_channels * row.attended
    return 2.0 * layers * row.tokens + 2.0 * output * row.scored + attention


def decode_bytes(
    architecture: Architecture, vocab_size: int, prefixes: list[int], rollouts: int, new_tokens: float, item: int = 2
) -> float:
    """Bytes that one decode step must read: every weight that multiplies, the keys and values of each prefix once, and
    those of the ``new_tokens`` that each of a prefix's rollouts has of its own (their mean over the steps)."""
    a = architecture
    look_up = vocab_size * a.hidden_size if a.untie_embeddings_and_output_weights else 0
    weights = count_parameters(a, vocab_size) - look_up
    per_token = 2 * a.num_layers * a.num_query_groups * a.kv_channels
    tokens = sum(prefixes) + len(prefixes) * rollouts * new_tokens
    return item * (weights + per_token * tokens)
