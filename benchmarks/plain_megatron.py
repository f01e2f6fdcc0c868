"""Megatron-Core's own GPTModel and optimizer: the other side of ``train_step.py --against megatron``.

It runs on our CPU platform, without which Megatron-Core does not start on CPU, but with its own products and
collectives put back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.pairs import Step


def plain_megatron_step(
    payload: dict[str, Any], architecture: dict[str, Any], tokens: torch.Tensor, learning_rate: float
) -> Step:
    """A step on tokens int64 [B, S + 1] that returns the loss."""
    from megatron_sip.distributed import ParallelConfig, initialize

    context = initialize(ParallelConfig(), seed=1)
    _put_megatrons_own_functions_back()
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from benchmarks.train_step import initial_weights
    from megatron_sip.model import ModelConfig
    from tests.model.hf_weights import load_llama

    dtype = torch.bfloat16 if payload["bf16"] else torch.float32
    model = _model(payload, architecture, dtype)
    load_llama([model], initial_weights(payload), ModelConfig(**architecture).resolve(), context)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=learning_rate,
            weight_decay=0.1,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=payload["bf16"],
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [wrapped],
    )
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss = wrapped(inputs, positions, None, labels=targets).float().mean()
        loss.backward()
        finalize_model_grads([wrapped])
        optimizer.step()
        return round(float(loss.detach()), 4)

    return step


def _model(payload: dict[str, Any], architecture: dict[str, Any], dtype: torch.dtype) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    widths = {key: value for key, value in architecture.items() if not key.startswith(("max_", "untie_"))}
    config = TransformerConfig(
        **widths,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=payload["bf16"],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bias_activation_fusion=False,  # these fusions compile for CUDA
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=payload["vocab_size"],
        max_sequence_length=architecture["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _put_megatrons_own_functions_back() -> None:
    """After the platform has replaced them: fresh copies of their modules' definitions."""
    import importlib.util
    import sys

    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers

    names = {
        layers: ("linear_with_grad_accumulation_and_async_allreduce", "F"),
        param_and_grad_buffer: ("dist_all_gather_func", "dist_reduce_scatter_func"),
    }
    for module, functions in names.items():
        spec = importlib.util.find_spec(module.__name__)
        assert spec is not None and spec.loader is not None
        fresh = importlib.util.module_from_spec(spec)
        sys.modules.pop(fresh.__name__ + " (fresh)", None)
        spec.loader.exec_module(fresh)
        for name in functions:
            setattr(module, name, getattr(fresh, name))
