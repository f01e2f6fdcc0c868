"""The modules that a layer is made of: Megatron's local ones, or Transformer Engine's, with our norm and attention."""

from __future__ import annotations

import importlib.util
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


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron builds norms.

    Megatron's wrapper of it refuses sequence parallelism, for want of this mark: with it the gradients of the weights
    are summed over the tensor-parallel ranks, each of which sees a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (not an attribute of its type)


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
    layer.submodules.self_attention.submodules.core_attention = PlannedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def _use_our_norm(layer: ModuleSpec, qk_layernorm: bool) -> None:
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
