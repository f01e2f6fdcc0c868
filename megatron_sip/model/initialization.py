"""Initial weights that depend on the seed and on a weight's name, and not on the layout.

Each weight is drawn whole on the CPU from a generator of its own, seeded with (seed, global name), and every rank keeps
its part. So TP, PP, virtual stages and device do not change the model one starts from; padded vocabulary rows are zero.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sip.model.policy import PolicyModel

_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_SCALED_DOWN = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""Weights that write to the residual stream: their deviation shrinks with depth (Radford et al. 2019)."""


def initialize_weights(chunk: PolicyModel, seed: int, std: float, num_layers: int) -> None:
    """Draws all weights of a (virtual) stage: normal with deviation ``std``, norms 1, biases 0."""
    offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage, chunk.pg_collection.pp.rank())
    for local_name, parameter in chunk.named_parameters():
        name = _global_name(local_name, offset, tied=chunk.share_embeddings_and_output_weights)
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = std / math.sqrt(2 * num_layers) if name.endswith(_SCALED_DOWN) else std
                whole = torch.empty(_whole_shape(chunk, name, parameter), dtype=torch.float32)
                whole.normal_(0.0, scale, generator=torch.Generator().manual_seed(_seed_of(seed, name)))
                _keep_part(parameter, whole, chunk, name)


def _global_name(name: str, layer_offset: int, tied: bool) -> str:
    if tied and name == "output_layer.weight":  # the last stage's copy of the embedding
        return "embedding.word_embeddings.weight"
    return _LOCAL_LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + layer_offset}.", name)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _is_vocabulary(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")


def _split_dimension(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that Megatron splits over tensor-parallel ranks, if it does."""
    return int(getattr(parameter, "partition_dim", 0)) if getattr(parameter, "tensor_model_parallel", False) else None


def _whole_shape(chunk: PolicyModel, name: str, parameter: torch.nn.Parameter) -> list[int]:
    shape = list(parameter.shape)
    if _is_vocabulary(name):
        shape[0] = chunk.num_tokens  # without padding, whose size depends on TP
    elif (dim := _split_dimension(parameter)) is not None:
        shape[dim] *= chunk.pg_collection.tp.size()
    return shape


def _keep_part(parameter: torch.nn.Parameter, whole: torch.Tensor, chunk: PolicyModel, name: str) -> None:
    group = chunk.pg_collection.tp
    rank, size = group.rank(), group.size()
    if _is_vocabulary(name):
        first = rank * parameter.shape[0]
        part = whole[first : first + parameter.shape[0]]
        parameter.zero_()
        parameter[: part.shape[0]].copy_(part)
        return
    if name.endswith("mlp.linear_fc1.weight"):  # gate and up are split apart, and stacked on each rank
        part = torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    elif (dim := _split_dimension(parameter)) is not None:
        part = whole.chunk(size, dim=dim)[rank]
    else:
        part = whole
    parameter.copy_(part)
