"""The modules that a layer is made of: Megatron's local ones, or Transformer Engine's, with our norm and attention."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.errors import ConfigurationError
from megatron_sip.model.attention import PlannedAttention
from megatron_sip.model.layers import GatedMLP, PlannedSelfAttention, RMSNorm


def transformer_engine_is_installed() -> bool:
    """Whether Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(transformer_impl: str, device: torch.device) -> bool:
    """Which kernels "auto", "local" or "transformer_engine" means on a device.

    Raises:
        ConfigurationError: Transformer Engine was asked for and cannot be had.
    """
    possible = device.type == "cuda" and transformer_engine_is_installed()
    if transformer_impl == "transformer_engine" and not possible:
        raise ConfigurationError(
            f"--transformer-impl transformer_engine needs CUDA (the device is {device.type}) and Transformer Engine "
            f"(installed: {'yes' if transformer_engine_is_installed() else 'no'}): use NVIDIA's PyTorch image, or "
            "--transformer-impl auto."
        )
    return possible and transformer_impl != "local"


def block_submodules(
    config: TransformerConfig, num_layers: int, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """``num_layers`` layers and the final norm of one (virtual) stage."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        final_norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        _use_our_norm(layer, config.qk_layernorm)
        final_norm = RMSNorm
    layer.submodules.self_attention.module = PlannedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = PlannedAttention
    _use_our_mlp(layer)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _use_our_mlp(layer: ModuleSpec) -> None:
    if isinstance(layer.submodules.mlp, ModuleSpec):
        layer.submodules.mlp.module = GatedMLP
    else:  # 0.19: a partial of the class's own builder
        layer.submodules.mlp = partial(GatedMLP.as_mlp_submodule, **layer.submodules.mlp.keywords)


def _use_our_norm(layer: ModuleSpec, qk_layernorm: bool) -> None:
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
