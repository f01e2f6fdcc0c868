"""The parameters of a stage as plain tensors: this rank's share, or the whole of all tensor-parallel ranks.

h, g, d  heads, key-value groups, head width    F  width of the MLP    V  padded vocabulary    H  hidden size
(all but d and H of this rank, or of the whole)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sip.model import PolicyModel
from megatron_sip.model.attention import PlannedAttention


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer: RMSNorm, grouped-query attention, SwiGLU."""

    number: int
    """Global number, from 1."""
    attention_norm: torch.Tensor
    """[H]."""
    qkv: torch.Tensor
    """[g * (h / g + 2) * d, H]: per group its query heads, its key, its value."""
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    """[d]."""
    key_norm: torch.Tensor | None
    """[d]."""
    proj: torch.Tensor
    """[H, h * d]."""
    mlp_norm: torch.Tensor
    """[H]."""
    fc1: torch.Tensor
    """[2 F, H]: gate before up."""
    fc2: torch.Tensor
    """[H, F]."""


@dataclass(frozen=True)
class StageWeights:
    """One (virtual) pipeline stage."""

    layers: tuple[LayerWeights, ...]
    embedding: torch.Tensor | None
    """[V, H] on the first stage."""
    final_norm: torch.Tensor | None
    """[H] on the last stage."""
    output: torch.Tensor | None
    """[V, H] on the last stage."""


def is_known_architecture(chunk: PolicyModel) -> bool:
    """Whether all layers of a stage are of the one kind that ``lean.py`` computes."""
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


def whole_model_bytes(chunk: PolicyModel) -> int:
    """Size of the matrices of all stages together; the same number on every rank."""
    config = chunk.config
    heads = config.num_attention_heads + config.num_query_groups
    per_layer = 2 * heads * config.kv_channels + 3 * config.ffn_hidden_size
    matrices = config.hidden_size * (config.num_layers * per_layer + 2 * chunk.vocab_size)
    return int(matrices * config.params_dtype.itemsize)


def own_weights(chunk: PolicyModel) -> StageWeights:
    """This rank's parameters themselves, without a copy."""
    output = None
    if chunk.post_process:
        tied = chunk.share_embeddings_and_output_weights
        output = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    return StageWeights(
        layers=tuple(_own_layer(layer) for layer in chunk.decoder.layers),
        embedding=chunk.embedding.word_embeddings.weight if chunk.pre_process else None,
        final_norm=chunk.decoder.final_layernorm.weight if chunk.post_process else None,
        output=output,
    )


def gather_weights(own: StageWeights, group: dist.ProcessGroup) -> StageWeights:
    """The whole matrices, on every rank of the tensor-parallel group; norms are whole on every rank already."""

    def rows(share: torch.Tensor) -> torch.Tensor:
        return torch.cat(_gather(share, group), dim=0)

    def layer(weights: LayerWeights) -> LayerWeights:
        gates_and_ups = [share.chunk(2) for share in _gather(weights.fc1, group)]
        return LayerWeights(
            number=weights.number,
            attention_norm=weights.attention_norm,
            qkv=rows(weights.qkv),
            qkv_bias=None if weights.qkv_bias is None else rows(weights.qkv_bias),
            query_norm=weights.query_norm,
            key_norm=weights.key_norm,
            proj=torch.cat(_gather(weights.proj, group), dim=1),
            mlp_norm=weights.mlp_norm,
            fc1=torch.cat([gate for gate, _ in gates_and_ups] + [up for _, up in gates_and_ups]),
            fc2=torch.cat(_gather(weights.fc2, group), dim=1),
        )

    return StageWeights(
        layers=tuple(layer(weights) for weights in own.layers),
        embedding=None if own.embedding is None else rows(own.embedding),
        final_norm=own.final_norm,
        output=None if own.output is None else rows(own.output),
    )


def _gather(share: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    shares = [torch.empty_like(share) for _ in range(group.size())]
    dist.all_gather(shares, share.detach().contiguous(), group=group)
    return shares


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


def _own_layer(layer: TransformerLayer) -> LayerWeights:
    attention, mlp = layer.self_attention, layer.mlp
    return LayerWeights(
        number=attention.core_attention.layer_number,
        attention_norm=layer.input_layernorm.weight,
        qkv=attention.linear_qkv.weight,
        qkv_bias=attention.linear_qkv.bias,
        query_norm=getattr(attention.q_layernorm, "weight", None),
        key_norm=getattr(attention.k_layernorm, "weight", None),
        proj=attention.linear_proj.weight,
        mlp_norm=layer.pre_mlp_layernorm.weight,
        fc1=mlp.linear_fc1.weight,
        fc2=mlp.linear_fc2.weight,
    )
