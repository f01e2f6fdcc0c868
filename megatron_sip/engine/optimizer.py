"""Megatron-Core's optimizer, with what it leaves open for torch's AdamW put right.

Without Transformer Engine and Apex Megatron falls back to ``torch.optim.AdamW``, unfused and with two faults in its
loading: all parameters share one ``step`` tensor afterwards, which then advances once per parameter and step, and the
fully reshardable format, which has no ``step`` per parameter, raises KeyError. Both are in 0.16.1 and in 0.19.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import param_is_not_shared

from megatron_sip.distributed import ParallelContext
from megatron_sip.engine.config import EngineConfig
from megatron_sip.errors import SIPError

STATE_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Metadata for every ``sharded_state_dict``: optimizer state in the parameters' shapes, loadable at any layout."""


class Optimizer:
    """AdamW over the parameters of this rank's chunks, sharded over the data-parallel ranks."""

    def __init__(
        self, config: EngineConfig, context: ParallelContext, wrapped: Sequence[DistributedDataParallel]
    ) -> None:
        self._config = config
        self._wrapped = list(wrapped)
        self._context = context
        bf16 = bool(wrapped[0].config.bf16)
        megatron_config = OptimizerConfig(
            optimizer=config.optimizer,
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=context.config.use_distributed_optimizer,
            overlap_param_gather=context.config.overlap_param_gather,
        )
        overrides = get_standard_config_overrides(megatron_config)
        chained = get_megatron_optimizer(megatron_config, self._wrapped, config_overrides=overrides)
        (self._megatron,) = chained.chained_optimizers  # one: experts would have a second
        self._inner: torch.optim.Optimizer = self._megatron.optimizer
        self._is_torch = isinstance(self._inner, torch.optim.AdamW)
        self._use_fused_kernels()
        self._allocate_state()

    def zero_grad(self) -> None:
        """Drops the gradients of the optimizer's own (main) parameters."""
        self._megatron.zero_grad()

    def prepare(self) -> float:
        """Hands the reduced gradients to the main parameters; returns the global gradient norm."""
        self._megatron.prepare_grads()
        return float(self._megatron.get_grad_norm())

    def step(self, grad_norm: float, learning_rate: float) -> None:
        """Clips, updates, and gathers the new parameters."""
        self._set_group_options(learning_rate)
        self._clip(grad_norm)
        self._megatron.step_with_ready_grads()

    def finish_parameter_sync(self) -> None:
        """Completes an all-gather of parameters that is left to the next forward pass (``overlap_param_gather``)."""
        if self._context.config.overlap_param_gather:
            for chunk in self._wrapped:
                chunk.start_param_sync(force_sync=True)

    def reload_main_parameters(self) -> None:
        """Copies the model's parameters to the main ones, after they were changed from outside."""
        self._megatron.reload_model_params()

    def parameter_norm(self) -> float:
        """L2 norm of the whole model's parameters, each counted once."""
        squares = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for chunk in self._wrapped:
            for parameter in chunk.parameters():
                duplicate = not tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
                if param_is_not_shared(parameter) and not duplicate:
                    squares += parameter.detach().float().norm().double() ** 2
        dist.all_reduce(squares, group=self._context.model_parallel_group)
        return float(squares.sqrt())

    def sharded_state_dict(
        self, model_state: Mapping[str, Any], is_loading: bool, metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """State for ``dist_checkpointing``; ``model_state`` is the model's.

        Raises:
            SIPError: ``metadata`` tells of optimizer state that is bound to its layout.
        """
        sharding_type = metadata["distrib_optim_sharding_type"]
        if sharding_type != STATE_FORMAT["distrib_optim_sharding_type"]:
            raise SIPError(
                f"the checkpoint's optimizer state is laid out as {sharding_type}, not as "
                f"{STATE_FORMAT['distrib_optim_sharding_type']}: load its weights alone with --no-load-optim."
            )
        state: dict[str, Any] = self._megatron.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=dict(metadata)
        )
        if is_loading:
            # Megatron has allocated its state by loading it into itself, which shares the steps.
            self._give_each_parameter_its_step()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what ``dist_checkpointing`` loaded for ``sharded_state_dict(is_loading=True)``."""
        state = dict(state)
        for group in state.get("optimizer", state)["param_groups"]:
            # Groups are recognised by these numbers, so that a run with another --lr could not load.
            group["max_lr"], group["min_lr"] = self._config.lr, self._config.min_lr
        if not (self._is_torch and isinstance(self._megatron, DistributedOptimizer)):
            self._megatron.load_state_dict(state)
        else:
            tensors = state.pop("param_state")
            self._megatron.load_state_dict(state)
            # The loader wants every key of a parameter's state in the file, where there is no step.
            steps = [(values, values.pop("step").clone()) for values in self._inner.state.values()]
            self._megatron.load_parameter_state_from_fully_reshardable(tensors)
            for values, step in steps:
                values["step"] = step
        self._give_each_parameter_its_step()
        self._use_fused_kernels()
        self._set_group_options(learning_rate=self._config.lr)

    def _clip(self, grad_norm: float) -> None:
        parameters = self._megatron.get_parameters()
        if self._config.clip_grad <= 0 or not parameters:
            return
        if not self._is_torch:
            clip_grad_by_total_norm_fp32(parameters, max_norm=self._config.clip_grad, total_norm=grad_norm)
            return
        # torch's fused AdamW divides the gradients by this on its way: no pass over them, and no second copy of them.
        divisor = max(1.0, (grad_norm + 1e-6) / self._config.clip_grad)
        self._inner.grad_scale = torch.full((), divisor, device=self._context.device)  # type: ignore[attr-defined]

    def _parameters(self) -> Iterator[torch.Tensor]:
        for group in self._inner.param_groups:
            yield from group["params"]

    def _use_fused_kernels(self) -> None:
        if self._is_torch:
            for group in self._inner.param_groups:
                group["fused"], group["foreach"] = True, False

    def _allocate_state(self) -> None:
        """Allocates Adam's moments now: a state without them can neither be saved nor loaded at step 0."""
        if not self._is_torch:
            self._megatron.init_state_fn(self._inner, self._megatron.config)
            return
        for parameter in self._parameters():
            self._inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def _give_each_parameter_its_step(self) -> None:
        if self._is_torch:
            for values in self._inner.state.values():
                values["step"] = values["step"].clone()

    def _set_group_options(self, learning_rate: float) -> None:
        """The run's own options, not those of the checkpoint it was loaded from."""
        config = self._config
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
            group["betas"] = (config.adam_beta1, config.adam_beta2)
            group["eps"] = config.adam_eps
