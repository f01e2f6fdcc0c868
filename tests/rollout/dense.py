"""A plain Llama on whole sequences: the reference for generation. No cache, no split, no Megatron.

Weights come by their Megatron names and in Megatron's order of rows (per key-value group its query heads, its key, its
value; gate before up), whole, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """The tiny policy of these tests."""

    num_layers: int = 4
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    ffn: int = 48
    vocab: int = 75
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def depth(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


def logits(shape: Shape, weights: Mapping[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """float64 [n, vocab]: the next-token logits after each token of a sequence."""

    def norm(hidden: torch.Tensor, name: str) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + shape.epsilon) * weights[name]

    hidden = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(shape.num_layers):
        name = f"decoder.layers.{layer}."
        qkv = norm(hidden, name + "input_layernorm.weight") @ weights[name + "self_attention.linear_qkv.weight"].T
        hidden = hidden + _attention(shape, qkv) @ weights[name + "self_attention.linear_proj.weight"].T
        gate_up = norm(hidden, name + "pre_mlp_layernorm.weight") @ weights[name + "mlp.linear_fc1.weight"].T
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weights[name + "mlp.linear_fc2.weight"].T
    output = norm(hidden, "decoder.final_layernorm.weight") @ weights["output_layer.weight"].T
    return output[:, : shape.vocab]


def _attention(shape: Shape, qkv: torch.Tensor) -> torch.Tensor:
    length, shared = len(qkv), shape.heads // shape.groups
    split = qkv.view(length, shape.groups, shared + 2, shape.depth)
    frequencies = shape.rope_base ** (-torch.arange(0, shape.depth, 2, dtype=torch.float64) / shape.depth)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    cos, sin = (torch.cat([part, part], dim=-1)[:, None, None] for part in (angles.cos(), angles.sin()))

    def rotate(tensor: torch.Tensor) -> torch.Tensor:
        first, second = tensor.chunk(2, dim=-1)
        return tensor * cos + torch.cat([-second, first], dim=-1) * sin

    query, key, value = rotate(split[:, :, :shared]), rotate(split[:, :, shared : shared + 1]), split[:, :, shared + 1]
    scores = torch.einsum("igsd,jgod->gsij", query, key) / shape.depth**0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    probabilities = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return torch.einsum("gsij,jgd->igsd", probabilities, value).reshape(length, -1)
