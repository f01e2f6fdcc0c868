"""Gradients of several schedule calls, reduced once.

Megatron-Core's schedules finalize gradients at the end of every call. Two calls in a step would reduce the first one's
gradients twice: with the distributed optimizer the norm is then silently wrong, with overlap it asserts. So the
schedules get no finalizer here, all calls but the last run without synchronization, and one finalize ends the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from megatron_sip.distributed import ParallelContext


def wrap_chunks(chunks: Sequence[Any], context: ParallelContext, reduce_in_fp32: bool) -> list[DistributedDataParallel]:
    """Puts each model chunk (in place) into Megatron's gradient and parameter buffers."""
    for chunk in chunks:
        _own_schedule_options(chunk.config)
    parallel = context.config
    wrapped = []
    for number, chunk in enumerate(chunks):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=reduce_in_fp32,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            # Its own check ends the run at the first NaN: the engine looks at the norm and skips the step.
            check_for_nan_in_grad=False,
        )
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0))
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def _own_schedule_options(config: Any) -> None:
    """Sets the schedules' part of a TransformerConfig, which belongs to the engine."""
    if not config.calculate_per_token_loss:
        raise ValueError("the model's config must have calculate_per_token_loss, else gradients are divided once more")
    config.finalize_model_grads_func = None
    config.no_sync_func = None
    config.grad_sync_func = None
    config.param_sync_func = None
    config.grad_scale_func = None
    if config.overlap_p2p_comm:
        # It frees an output as soon as its send is issued. Gloo was still reading it: now and then a NaN, or silently
        # another loss. (Plain 1F1B waits for its sends first.)
        config.deallocate_pipeline_outputs = False


class GradientStep:
    """The gradient buffers from ``begin`` over any number of ``call`` to ``finish``."""

    def __init__(self, wrapped: Sequence[DistributedDataParallel]) -> None:
        self._chunks = list(wrapped)
        self._overlap = self._chunks[0].ddp_config.overlap_grad_reduce

    def begin(self) -> None:
        """Zeroes the buffers."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    @contextmanager
    def call(self, last: bool) -> Iterator[None]:
        """Surrounds one schedule call; only within the ``last`` one may reductions start."""
        configs = [chunk.config for chunk in self._chunks]
        with ExitStack() as stack:
            if self._overlap and last:
                functions = [chunk.no_sync for chunk in self._chunks]
                for config in configs:
                    config.no_sync_func = functions if len(functions) > 1 else functions[0]
            elif self._overlap:
                # The schedule's own no_sync must be off here: leaving it switches synchronization on again.
                for chunk in self._chunks:
                    stack.enter_context(chunk.no_sync())
            try:
                yield
            finally:
                for config in configs:
                    config.no_sync_func = None

    def finish(self) -> None:
        """Reduces over data-parallel ranks, and what sequence parallelism and tied embeddings leave to be summed."""
        modules: list[torch.nn.Module] = list(self._chunks)
        finalize_model_grads(modules, num_tokens=None)
