"""A decode step of a stage without its modules' bookkeeping.

Megatron's layers run about 650 tensor functions and as many Python calls for a token of a 4-layer model, most of them
for cases that do not occur in generation; on CPU that took more than half of a step. This is the same arithmetic on the
same parameters in about 150. What it does not know (Transformer Engine's layers, biases in the MLP) goes through the
modules.

    R  rows, one token each    H  hidden size    h, g, d  heads, key-value groups, head width of this rank
    q  query heads per group, h / g    v  vocabulary columns of this rank
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sip.model import PolicyModel
from megatron_sip.model.attention import PlannedAttention
from megatron_sip.types import AttentionPlan


def supports_lean_decode(chunk: PolicyModel) -> bool:
    """Whether all layers of a stage are of the one kind that this module computes."""
    config = chunk.config
    return (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and not config.add_bias_linear
        and not config.fp32_residual_connection
        and not config.apply_residual_connection_post_layernorm
        and (not chunk.post_process or isinstance(chunk.decoder.final_layernorm, torch.nn.RMSNorm))
        and all(_is_known(layer) for layer in chunk.decoder.layers)
    )


def _is_known(layer: TransformerLayer) -> bool:
    attention, mlp = layer.self_attention, layer.mlp
    return (
        isinstance(layer.input_layernorm, torch.nn.RMSNorm)
        and isinstance(layer.pre_mlp_layernorm, torch.nn.RMSNorm)
        and isinstance(attention.core_attention, PlannedAttention)
        and all(
            norm is None or isinstance(norm, IdentityOp | torch.nn.RMSNorm)
            for norm in (attention.q_layernorm, attention.k_layernorm)
        )
        and type(attention.linear_qkv) is ColumnParallelLinear
        and type(attention.linear_proj) is RowParallelLinear
        and type(mlp.linear_fc1) is ColumnParallelLinear
        and type(mlp.linear_fc2) is RowParallelLinear
    )


class LeanStage:
    """The decode steps of one (virtual) pipeline stage."""

    def __init__(self, chunk: PolicyModel, tp_group: dist.ProcessGroup, tp_size: int) -> None:
        self._chunk = chunk
        self._group = tp_group
        self._tp_size = tp_size
        self._layers = [_LeanLayer(layer, self._sum) for layer in chunk.decoder.layers]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [R] -> [R, H]; for the first stage."""
        embedding = self._chunk.embedding.word_embeddings
        if self._tp_size == 1:
            return F.embedding(tokens, embedding.weight)
        local = tokens - embedding.vocab_start_index
        elsewhere = (local < 0) | (local >= embedding.weight.shape[0])
        vectors = F.embedding(local.masked_fill_(elsewhere, 0), embedding.weight)
        return self._sum(vectors.masked_fill_(elsewhere[:, None], 0.0))

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [R] -> cosines and signed sines [R, 1, 1, d], as ``_LeanLayer`` takes them; the same for all layers."""
        angles = positions.float()[:, None] * self._chunk.rotary_frequencies
        sines = angles.sin()
        cosines = angles.cos().repeat(1, 2)
        dtype = self._chunk.config.params_dtype
        return cosines[:, None, None].to(dtype), torch.cat([-sines, sines], dim=1)[:, None, None].to(dtype)

    def layers(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan
    ) -> torch.Tensor:
        """[R, H] -> [R, H]."""
        for layer in self._layers:
            hidden = layer(hidden, rotation, plan)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] -> [R, v], padded columns as they come; for the last stage."""
        chunk = self._chunk
        if chunk.share_embeddings_and_output_weights:
            weight = chunk.shared_embedding_or_output_weight()
        else:
            weight = chunk.output_layer.weight
        return F.linear(_norm(chunk.decoder.final_layernorm, hidden), weight)

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self._tp_size > 1:
            dist.all_reduce(partial, group=self._group)
        return partial


class _LeanLayer:
    """One layer; it holds the parameters themselves, which an optimizer changes in place."""

    def __init__(self, layer: TransformerLayer, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self._sum = all_reduce
        self._number = attention.core_attention.layer_number
        self._attention_norm = layer.input_layernorm
        self._mlp_norm = layer.pre_mlp_layernorm
        self._qkv, self._qkv_bias = attention.linear_qkv.weight, attention.linear_qkv.bias
        self._proj = attention.linear_proj.weight
        self._fc1, self._fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight
        self._depth = attention.hidden_size_per_attention_head
        self._groups = attention.num_query_groups_per_partition
        self._shared = attention.num_attention_heads_per_partition // self._groups
        self._query_norm, self._key_norm = attention.q_layernorm, attention.k_layernorm

    def __call__(
        self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan
    ) -> torch.Tensor:
        mixed = F.linear(_norm(self._attention_norm, hidden), self._qkv, self._qkv_bias)
        query, key, value = self._split(mixed, rotation)
        attended = plan.attend(self._number, query, key, value)[:, 0]
        hidden = hidden + self._sum(F.linear(attended, self._proj))
        gate, up = F.linear(_norm(self._mlp_norm, hidden), self._fc1).chunk(2, dim=-1)
        return hidden + self._sum(F.linear(F.silu(gate) * up, self._fc2))

    def _split(
        self, mixed: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[R, g * (q + 2) * d] -> query [R, 1, h, d], key and value [R, 1, g, d], rotated."""
        rows, shared, depth = len(mixed), self._shared, self._depth
        heads = mixed.view(rows, self._groups, shared + 2, depth)
        turning = heads[:, :, :-1]  # queries and the key of a group turn by the same angles
        if isinstance(self._query_norm, torch.nn.RMSNorm):
            turning = torch.cat(
                [
                    _norm(self._query_norm, heads[:, :, :shared]),
                    _norm(self._key_norm, heads[:, :, shared : shared + 1]),
                ],
                dim=2,
            )
        cosines, sines = rotation
        turned = torch.addcmul(turning * cosines, turning.roll(depth // 2, dims=-1), sines)
        query = turned[:, :, :shared].reshape(rows, 1, self._groups * shared, depth)
        return query, turned[:, None, :, shared], heads[:, None, :, shared + 1]


def _norm(norm: torch.nn.RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.normalized_shape, norm.weight, norm.eps)
