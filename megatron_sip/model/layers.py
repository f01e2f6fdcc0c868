"""Modules of a layer: Megatron-Core's, with forward passes that skip what a Llama-style decoder never needs.

They hold the same parameters under the same names; only the local norm is torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.model.kernels import rms_norm, rotate, split_and_rotate, swiglu
from megatron_sip.model.rope import Rotation
from megatron_sip.types import AttentionPlan


@dataclass(frozen=True)
class PassInputs:
    """What every layer of one forward pass is given beside its hidden states.

    It travels as the argument that Megatron calls ``attention_bias``, which passes through all layers untouched, so
    that it belongs to one forward pass and survives recomputation with several micro-batches in flight.
    """

    plan: AttentionPlan
    rotation: Rotation


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron builds norms.

    Megatron's wrapper of it refuses sequence parallelism, for want of this mark: with it the gradients of the weights
    are summed over the tensor-parallel ranks, each of which sees a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (not an attribute of its type)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class PlannedSelfAttention(SelfAttention):
    """Self-attention whose positions and whose pattern are the forward pass's own.

    Megatron's rotates by the sequence index, computes sines and cosines twice in every layer, and copies queries and
    keys on the way.
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, *unused: Any, attention_bias: Any = None,
        **also_unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Hidden states [s, b, H] ([s / tp, b, H] with sequence parallelism) -> the same, and the projection's bias.

        ``attention_bias``: the pass's ``PassInputs``.
        """
        inputs = cast(PassInputs, attention_bias)
        mixed, _ = self.linear_qkv(hidden_states)
        query, key, value = self._heads(mixed, inputs.rotation)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.core_attention(query, key, value, None, attention_bias=inputs.plan)
            return result

        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            context = attend(query, key, value)
        output, bias = self.linear_proj(context)
        return output, bias

    def _heads(self, mixed: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        if self.q_layernorm is None or isinstance(self.q_layernorm, IdentityOp):
            return split_and_rotate(mixed, rotation, groups, width)
        heads = mixed.unflatten(-1, (groups, -1, width))
        query, key = self.q_layernorm(heads[..., :-2, :].flatten(2, 3)), self.k_layernorm(heads[..., -2, :])
        return rotate(query, rotation), rotate(key, rotation), heads[..., -1, :]


class GatedMLP(MLP):
    """Megatron's MLP with SwiGLU computed in few passes."""

    def forward(
        self, hidden_states: torch.Tensor, *unused: Any, **also_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, H] -> the same, and the second layer's bias."""
        gate_and_up, _ = self.linear_fc1(hidden_states)
        output, bias = self.linear_fc2(swiglu(gate_and_up))
        return output, bias
