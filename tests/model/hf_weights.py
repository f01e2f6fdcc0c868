"""Weights of ``transformers.LlamaForCausalLM`` in the policy's names and shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_sip.distributed import ParallelContext
from megatron_sip.model import PolicyModel
from megatron_sip.model.presets import Architecture


def load_llama(
    chunks: list[PolicyModel], weights: Mapping[str, torch.Tensor], architecture: Architecture, context: ParallelContext
) -> None:
    """Copies a state dict of Llama into this rank's stages; padded vocabulary rows become 1e3, to be noticed."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            with torch.no_grad():
                parameter.fill_(1e3)
                part = expected_part(name, chunk, weights, architecture, context)
                parameter[: part.shape[0]].copy_(part)


def expected_part(
    name: str,
    chunk: PolicyModel,
    weights: Mapping[str, torch.Tensor],
    architecture: Architecture,
    context: ParallelContext,
) -> torch.Tensor:
    """This rank's part of a parameter, from Llama's weights or from its gradients; padding rows are left out."""
    rank, size = context.tp_rank, context.tp_size
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tied = not architecture.untie_embeddings_and_output_weights
        whole = weights["model.embed_tokens.weight" if tied or name.startswith("embedding") else "lm_head.weight"]
        rows = -(-chunk.vocab_size // size)
        return whole[rank * rows : (rank + 1) * rows]
    if name == "decoder.final_layernorm.weight":
        return weights["model.norm.weight"]
    local, _, module = name.removeprefix("decoder.layers.").partition(".")
    layer = f"model.layers.{chunk.decoder.layers[int(local)].layer_number - 1}."
    if module == "input_layernorm.weight":
        return weights[layer + "input_layernorm.weight"]
    if module == "pre_mlp_layernorm.weight":
        return weights[layer + "post_attention_layernorm.weight"]
    if module == "self_attention.linear_proj.weight":
        return weights[layer + "self_attn.o_proj.weight"].chunk(size, dim=1)[rank]
    if module == "mlp.linear_fc2.weight":
        return weights[layer + "mlp.down_proj.weight"].chunk(size, dim=1)[rank]
    if module == "mlp.linear_fc1.weight":
        halves = (weights[layer + f"mlp.{half}_proj.weight"].chunk(size)[rank] for half in ("gate", "up"))
        return torch.cat(tuple(halves))
    if module in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
        return weights[layer + f"self_attn.{module.removeprefix('self_attention.')[0]}_norm.weight"]
    if module == "self_attention.linear_qkv.bias":
        biases = [weights[layer + f"self_attn.{x}_proj.bias"].view(architecture.num_query_groups, -1) for x in "qkv"]
        return torch.cat(biases, dim=1).flatten().chunk(size)[rank]
    if module == "self_attention.linear_qkv.weight":
        groups = architecture.num_query_groups
        q, k, v = (weights[layer + f"self_attn.{x}_proj.weight"] for x in "qkv")
        grouped = [x.view(groups, -1, x.shape[-1]) for x in (q, k, v)]  # Megatron stacks q, k, v per group
        return torch.cat(grouped, dim=1).flatten(0, 1).chunk(size)[rank]
    raise KeyError(f"{name}: the policy has a parameter that Llama has not")
