"""A plain Megatron-Core GPTModel that trains on next tokens: what the checkpoint tests save and load.

It owes nothing to the package's own model and engine, so its sharded state is that of Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_sip.distributed import ParallelContext
from tests.checkpoint.adamw import allocate_optimizer_state, load_optimizer_state

VOCABULARY = 64
LENGTH = 16
BATCH = 8
"""Samples of a step, over all ranks."""


class CausalSelfAttention(MegatronModule):
    """torch's attention in the place of Megatron-Core's, which wants CUDA."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *unused: Any, **also: Any) -> Any:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def config_of(context: ParallelContext, num_layers: int, virtual_stages: int | None = None) -> TransformerConfig:
    """A Llama in small, with grouped queries."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        tensor_model_parallel_size=context.tp_size,
        pipeline_model_parallel_size=context.pp_size,
        virtual_pipeline_model_parallel_size=virtual_stages,
        pipeline_dtype=torch.float32,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
    )


def model_of(
    config: TransformerConfig, vocabulary: int, first: bool, last: bool, virtual_stage: int | None = None
) -> GPTModel:
    """One chunk of the model, built of Megatron-Core's own parts but for the attention."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CausalSelfAttention
    return GPTModel(
        config,
        spec,
        vocabulary,
        LENGTH,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        parallel_output=True,
        vp_stage=virtual_stage,
    )


class Trainee:
    """Model, DDP and distributed optimizer at this rank's layout; the same weights for the same seed and TP size."""

    def __init__(
        self,
        context: ParallelContext,
        vocabulary: int = VOCABULARY,
        num_layers: int = 2,
        reference: torch.Tensor | None = None,
    ) -> None:
        self.context = context
        self.reference = reference
        """Stands for a reference policy: saved beside the model, in the shape of its embedding."""
        self.model_config = config_of(context, num_layers)
        self.model = model_of(self.model_config, vocabulary, context.is_first_stage, context.is_last_stage)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.chunk = DistributedDataParallel(self.model_config, ddp, self.model)
        self.chunk.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.1,
                adam_eps=1e-6,
                clip_grad=1.0,
                use_distributed_optimizer=True,
            ),
            [self.chunk],
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        self.model_config.finalize_model_grads_func = finalize_model_grads
        self.model_config.grad_scale_func = None

    def train(self, first: int, last: int) -> list[float]:
        """Steps ``first`` to ``last - 1``; the mean loss of each, on every rank."""
        return [self._step(step) for step in range(first, last)]

    def state(self, *, is_loading: bool, with_optimizer: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The manager's StateBuilder."""
        state: dict[str, Any] = {"model": self.model.sharded_state_dict(metadata=dict(metadata))}
        if with_optimizer:
            allocate_optimizer_state(self.optimizer)
            state["optimizer"] = self.optimizer.sharded_state_dict(
                state, is_loading=is_loading, metadata=dict(metadata)
            )
        if self.reference is not None:
            table = state["model"]["embedding.word_embeddings.weight"]
            state["reference"] = {"table": replace(table, key=f"reference.{table.key}", data=self.reference)}
        return state

    def take(self, state: Mapping[str, Any]) -> None:
        """Takes over a loaded state."""
        self.model.load_state_dict(state["model"], strict=True)
        if "optimizer" in state:
            load_optimizer_state(self.optimizer, state["optimizer"])
        else:
            self.optimizer.reload_model_params()

    def weights(self) -> dict[str, list[Any]]:
        """This rank's parameters."""
        return {name: parameter.detach().tolist() for name, parameter in self.model.named_parameters()}

    def _step(self, step: int) -> float:
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = BATCH // self.context.dp_size
        tokens = _tokens(step)[self.context.dp_rank * rows : (self.context.dp_rank + 1) * rows]
        sums = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(tokens.split(1)),
            model=[self.chunk],
            num_microbatches=rows,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        succeeded, _, _ = self.optimizer.step()
        assert succeeded
        total = self.context.broadcast_from_last_stage(float(sum(sums)) if self.context.is_last_stage else None)
        return self.context.sum_over_data_parallel({"loss": total})["loss"] / (BATCH * LENGTH)


def _tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 61, (BATCH, LENGTH + 1), generator=generator)


def _forward(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(iterator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(LENGTH).expand_as(inputs)
    output = model(inputs, positions, None, labels=targets)
    return output, partial(_sum)


def _sum(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = losses.sum()
    return total, torch.tensor(LENGTH, dtype=torch.int), total.detach()
