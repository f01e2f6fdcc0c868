"""Runs micro-batches through Megatron-Core's schedules: no pipeline, 1F1B, or interleaved.

Shape legend: B rows of a micro-batch, S row length, L scored positions of a row (``megatron_sip.types``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sip.distributed import ParallelContext, pin
from megatron_sip.model import CausalPlan, ScoreTargets, SharedPrefixPlan
from megatron_sip.types import AttentionPlan, Objective, RowBatch

T = TypeVar("T")
Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
Loss = Callable[[torch.Tensor, RowBatch], tuple[torch.Tensor, T]]
"""log_probs [B, L] and their batch -> scalar that is differentiated, and what the call returns for the micro-batch."""
Gradient = Callable[[RowBatch], torch.Tensor | None]
"""Batch -> float32 [B, L], the scalar's gradient in the log-probs if it does not depend on them, else None."""


def _unknown(batch: RowBatch) -> None:
    return None


class PassRunner:
    """One schedule call per ``run``. Its micro-batches have the same rows and scored positions; prefix blocks may
    differ, since the stages of a pipeline tell each other the lengths."""

    def __init__(self, chunks: Sequence[torch.nn.Module], context: ParallelContext) -> None:
        self._chunks = list(chunks)
        self._context = context
        virtual_stages = len(self._chunks) if len(self._chunks) > 1 else None
        self._schedule = get_forward_backward_func(pp_size=context.pp_size, vp_size=virtual_stages)

    def run(
        self, batches: Sequence[RowBatch], loss: Loss[T], gradient: Gradient = _unknown, forward_only: bool = False
    ) -> list[T]:
        """What ``loss`` returned for each micro-batch, in order; empty on stages other than the last.

        ``gradient``: the loss's gradient in the log-probs, where it is known before them.

        Raises:
            ValueError: no micro-batch, or micro-batches of several kinds.
        """
        _check_alike(batches)
        moved = [to_device(batch, self._context.device) for batch in self._filled(batches)]
        results = self._schedule(
            forward_step_func=partial(_forward_step, loss, gradient),
            data_iterator=[iter(moved) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(moved),
            seq_length=max(batch.layout.length for batch in batches),
            micro_batch_size=batches[0].num_rows,
            forward_only=forward_only,
        )
        return list(results)[: len(batches)]

    def train(self, batches: Sequence[RowBatch], objective: Objective, scale: float) -> list[Metrics]:
        """Forward and backward: adds ``scale`` times the gradient of each loss sum to the gradient buffers."""

        def loss(log_probs: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, Metrics]:
            terms = objective(log_probs, batch)
            return terms.loss_sum * scale, dict(terms.metrics)

        def gradient(batch: RowBatch) -> torch.Tensor:
            # That of a linear loss is the same everywhere: also at 0.
            anywhere = torch.zeros_like(batch.mask, requires_grad=True)
            with torch.enable_grad():
                return torch.autograd.grad(loss(anywhere, batch)[0], anywhere)[0]

        return self.run(batches, loss, gradient if objective.is_linear else _unknown)

    def evaluate(self, batches: Sequence[RowBatch], objective: Objective) -> list[Metrics]:
        """Forward only, the chunks in evaluation mode."""

        def loss(log_probs: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, Metrics]:
            terms = objective(log_probs, batch)
            return terms.loss_sum, dict(terms.metrics)

        return self._forward(batches, loss)

    def score(self, batches: Sequence[RowBatch]) -> list[torch.Tensor]:
        """float32 log-probs [B, L] of each batch, on every rank of the replica; the shapes may differ."""
        scored: list[torch.Tensor] = [torch.empty(0)] * len(batches)
        by_kind: dict[tuple[int, ...], list[int]] = {}
        for index, batch in enumerate(batches):
            by_kind.setdefault(_kind(batch), []).append(index)
        for indices in by_kind.values():
            group = [batches[index] for index in indices]
            results = self._from_last_stage(self._forward(group, _scores), group)
            for index, log_probs in zip(indices, results, strict=True):
                scored[index] = log_probs
        return scored

    def _forward(self, batches: Sequence[RowBatch], loss: Loss[T]) -> list[T]:
        for chunk in self._chunks:
            chunk.eval()  # also switches recomputation off, which would only cost here
        try:
            with torch.no_grad():
                return self.run(batches, loss, forward_only=True)
        finally:
            for chunk in self._chunks:
                chunk.train()

    def _filled(self, batches: Sequence[RowBatch]) -> list[RowBatch]:
        """The interleaved schedule takes multiples of the pipeline's size: fillers of weight 0 complete the last."""
        if len(self._chunks) == 1:
            return list(batches)
        missing = -len(batches) % self._context.pp_size
        filler = replace(batches[-1], weights=torch.zeros_like(batches[-1].weights))
        return [*batches, *([filler] * missing)]

    def _from_last_stage(self, results: list[torch.Tensor], group: Sequence[RowBatch]) -> list[torch.Tensor]:
        context = self._context
        if context.pp_size == 1:
            return results
        shape = (len(group), group[0].num_rows, group[0].layout.num_scored)
        if context.is_last_stage:
            together = torch.stack(results)
        else:
            together = torch.empty(shape, dtype=torch.float32, device=context.device)
        source = dist.get_global_rank(context.pp_group, context.pp_size - 1)
        dist.broadcast(together, src=source, group=context.pp_group)
        return list(together.unbind())


def to_device(batch: RowBatch, device: torch.device) -> RowBatch:
    """The batch with its tensors on ``device``; the prefix lengths stay on the host, where attention reads them."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "prefix_lengths"}
    moved: dict[str, Any] = {
        name: _moved(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)
    }
    return replace(batch, **moved)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Out of pageable memory a copy would wait for all that the device has queued, whatever non_blocking says.
    source = pin(tensor, device) if tensor.device.type == "cpu" else tensor
    return source.to(device, non_blocking=True)


def plan_of(batch: RowBatch) -> AttentionPlan:
    """How the rows of a batch attend."""
    if batch.layout.num_candidates == 0:
        return CausalPlan()
    return SharedPrefixPlan(batch.layout, batch.prefix_lengths)


def _forward_step(
    loss: Loss[T], gradient: Gradient, batches: Iterator[RowBatch], chunk: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    asked = ScoreTargets(batch.targets, batch.sources, gradient(batch))
    output = chunk(batch.tokens, batch.positions, plan_of(batch), asked)
    return output, partial(_three_values, loss, batch)


def _three_values(loss: Loss[T], batch: RowBatch, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, T]:
    # Of two values Megatron divides the first by the number of micro-batches; of three, under calculate_per_token_loss,
    # it leaves the loss alone. The count is ours (TrainPass.scale), so theirs stays 0.
    value, result = loss(log_probs, batch)
    return value, torch.zeros((), dtype=torch.int, device=log_probs.device), result


def _scores(log_probs: torch.Tensor, batch: RowBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs.new_zeros(()), log_probs.detach()


def _kind(batch: RowBatch) -> tuple[int, ...]:
    """(rows, candidates, scored positions)."""
    return batch.num_rows, batch.layout.num_candidates, batch.layout.num_scored


def _check_alike(batches: Sequence[RowBatch]) -> None:
    if not batches:
        raise ValueError("a pass needs at least one micro-batch on every rank: give a filler of weight 0")
    kinds = {_kind(batch) for batch in batches}
    if len(kinds) > 1:
        raise ValueError(
            "the micro-batches of one pass must agree in (rows, candidates, scored positions), these have "
            f"{sorted(kinds)}"
        )
