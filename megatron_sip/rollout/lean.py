"""Forward passes of a stage without its modules' bookkeeping.

Megatron's layers run about 650 tensor functions and as many Python calls for a token of a 4-layer model, most of them
for cases that do not occur in generation; on CPU that took more than half of a step. This is the same arithmetic on the
same parameters in about 150.

    s, b  sequence and batch of a pass     H  hidden size    h, g, d  heads, key-value groups, head width of this rank
    q  query heads per group, h / g        v  vocabulary columns of this rank
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.distributed import linear
from megatron_sip.rollout.weights import LayerWeights, StageWeights
from megatron_sip.types import AttentionPlan

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and signed sines [s, b, 1, 1, d] of a pass."""


class LeanStage:
    """One (virtual) pipeline stage, with this rank's share of the weights or, without a group, with the whole."""

    def __init__(
        self,
        weights: StageWeights,
        config: TransformerConfig,
        rotary_frequencies: torch.Tensor,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        """``rotary_frequencies``: radians per position, float32 [d / 2]."""
        self._weights = weights
        self._config = config
        self._frequencies = rotary_frequencies
        self._group = tp_group
        self._depth = config.kv_channels
        self._shared = config.num_attention_heads // config.num_query_groups

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [b, s] -> [s, b, H]; for the first stage."""
        table = self._weights.embedding
        assert table is not None
        tokens = tokens.t()
        if self._group is None:
            return F.embedding(tokens, table)
        local = tokens - self._group.rank() * table.shape[0]
        elsewhere = (local < 0) | (local >= table.shape[0])
        vectors = F.embedding(local.masked_fill_(elsewhere, 0), table)
        return self._sum(vectors.masked_fill_(elsewhere[..., None], 0.0))

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """int64 [b, s] -> what all layers of a pass turn queries and keys by."""
        angles = positions.t().float()[..., None] * self._frequencies
        cosines, sines = angles.cos(), angles.sin()
        dtype = self._config.params_dtype
        signed = torch.cat([-sines, sines], dim=-1)
        return torch.cat([cosines, cosines], dim=-1)[:, :, None, None].to(dtype), signed[:, :, None, None].to(dtype)

    def layers(self, hidden: torch.Tensor, rotation: Rotation, plan: AttentionPlan) -> torch.Tensor:
        """[s, b, H] -> [s, b, H]."""
        for layer in self._weights.layers:
            mixed = linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
            attended = plan.attend(layer.number, *self._split(mixed, layer, rotation))
            hidden = hidden + self._sum(linear(attended, layer.proj))
            gate, up = linear(self._norm(hidden, layer.mlp_norm), layer.fc1).chunk(2, dim=-1)
            hidden = hidden + self._sum(linear(F.silu(gate) * up, layer.fc2))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, v], padded columns as they come; for the last stage."""
        weights = self._weights
        assert weights.final_norm is not None and weights.output is not None
        return linear(self._norm(hidden, weights.final_norm), weights.output)

    def _split(
        self, mixed: torch.Tensor, layer: LayerWeights, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[s, b, g * (q + 2) * d] -> query [s, b, h, d], key and value [s, b, g, d], rotated."""
        shared = self._shared
        heads = mixed.unflatten(-1, (-1, shared + 2, self._depth))
        turning = heads[..., :-1, :]  # the queries and the key of a group turn by the same angles
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = turning.split([shared, 1], dim=-2)
            turning = torch.cat([self._norm(queries, layer.query_norm), self._norm(keys, layer.key_norm)], dim=-2)
        cosines, sines = rotation
        turned = torch.addcmul(turning * cosines, turning.roll(self._depth // 2, dims=-1), sines)
        return turned[..., :shared, :].flatten(2, 3), turned[..., shared, :], heads[..., shared + 1, :]

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self._config.layernorm_epsilon)

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self._group is not None:
            dist.all_reduce(partial, group=self._group)
        return partial
