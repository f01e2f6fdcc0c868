"""Builds the policy's stages for this rank."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.distributed import ParallelConfig, ParallelContext
from megatron_sip.model.config import ModelConfig
from megatron_sip.model.initialization import initialize_weights
from megatron_sip.model.layer_spec import block_submodules, uses_transformer_engine
from megatron_sip.model.policy import PolicyModel
from megatron_sip.model.presets import Architecture, padded_vocab_size


def build_model(config: ModelConfig, vocab_size: int, context: ParallelContext) -> list[PolicyModel]:
    """This rank's part of the policy, one module per virtual stage (one without them), in bfloat16 if so configured.

    The weights depend on ``context.seed`` alone, not on the layout. The modules share one Megatron configuration
    (``chunks[0].config``). They need no ``Float16Module``: parameters are made in their precision, and log-probs and
    logits leave in float32.

    Raises:
        ConfigurationError: the architecture is impossible, or does not divide into the layout.
    """
    config.validate()
    config.validate_tensor_parallel(context.tp_size)
    architecture = config.resolve()
    num_virtual_stages = context.config.num_virtual_stages(architecture.num_layers)
    transformer_engine = uses_transformer_engine(config.transformer_impl, context.device)
    megatron_config = transformer_config(config, context.config, context.device)
    # Megatron's schedules ask this global which of them is meant.
    parallel_state.set_virtual_pipeline_model_parallel_world_size(num_virtual_stages)
    chunks = []
    last = (num_virtual_stages or 1) - 1
    for stage in range(last + 1):
        vp_stage = stage if num_virtual_stages is not None else None
        num_layers = get_num_layers_to_build(megatron_config, vp_stage, context.pp_rank)
        chunk = PolicyModel(
            megatron_config,
            architecture,
            block_submodules(megatron_config, num_layers, transformer_engine),
            vocab_size,
            padded_vocab_size(vocab_size, config.make_vocab_size_divisible_by, context.tp_size),
            context.device,
            pre_process=context.is_first_stage and stage == 0,
            post_process=context.is_last_stage and stage == last,
            vp_stage=vp_stage,
        )
        initialize_weights(chunk, context.seed, config.init_method_std, architecture.num_layers)
        chunks.append(chunk.to(context.device))
    return chunks


def transformer_config(config: ModelConfig, parallel: ParallelConfig, device: torch.device) -> TransformerConfig:
    """Megatron's configuration of model and schedules, with what the traps of its CPU and pipeline paths ask for."""
    architecture = config.resolve()
    num_virtual_stages = parallel.num_virtual_stages(architecture.num_layers)
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    whole_layers = config.recompute_granularity == "full"
    return TransformerConfig(
        **_architecture_arguments(architecture),
        init_method_std=config.init_method_std,
        bf16=config.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method if whole_layers else None,
        recompute_num_layers=config.recompute_num_layers if whole_layers else None,
        # Losses are sums that the caller has divided by the global count: nothing may divide them again.
        calculate_per_token_loss=True,
        # Rows of the objectives differ in length. The dispatcher is of no use to a dense model, but Megatron refuses
        # variable lengths with its default.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",
        # Interleaved stages over Gloo go silently wrong with batched sends; plain 1F1B refuses the overlapped ones.
        overlap_p2p_comm=num_virtual_stages is not None,
        batch_p2p_comm=num_virtual_stages is None,
        deallocate_pipeline_outputs=True,
        # Compiled kernels for what is not there (bias, dropout), compiled anew for every other width of the rows.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=on_cuda and _apex_accumulates_gradients(),
        apply_rope_fusion=False,  # it ignores positions per row
    )


def _architecture_arguments(a: Architecture) -> dict[str, object]:
    return {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "ffn_hidden_size": a.ffn_hidden_size,
        "kv_channels": a.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": a.add_qkv_bias,
        "qk_layernorm": a.qk_layernorm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _apex_accumulates_gradients() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
