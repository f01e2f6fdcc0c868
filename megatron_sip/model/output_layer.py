"""Log-probabilities of given tokens straight from hidden states: the logits exist a block of positions at a time.

Forward, a block's logits are reduced to the softmax's denominator and the target's logit. Backward they are computed
again, which costs one more product for the output layer; storing them would cost a tensor [n, v], the largest of the
whole step. Where the loss is linear in the log-probs its gradient is known beforehand, and one visit to each block
does both directions with nothing computed twice.

    n positions    H hidden size    v vocabulary columns of this rank, of which the first r are tokens
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.distributed import linear
from megatron_sip.model.logprobs import num_valid_columns

_MIN_ROWS = 128
"""Positions of a block, at least: with fewer, adding to the weight's gradient costs more than computing it."""
_BLOCK_LOGITS = {"cpu": 6 * 2**20, "cuda": 2**26}
"""Logits of a block. On CPU 24 MiB: above 32 MiB every block's memory comes anew from the system, page by page. A GPU
needs more to be busy."""
_WEIGHT_BLOCK = 2**20
"""Entries of the weight's gradient that are computed and added at a time: small enough for a cache."""


def target_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    gradient: torch.Tensor | None = None,
    tied: bool = False,
) -> torch.Tensor:
    """log softmax(hidden @ weight^T)[target], of the untruncated softmax at temperature 1 over the real vocabulary.

    Args:
        hidden: [n, H], the same on all ranks of ``group``; its gradient is summed over them.
        weight: [v, H], this rank's rows. Where Megatron's DDP has given it a ``main_grad`` its gradient goes there.
        targets: int64 [n], global token ids below ``vocab_size``.
        vocab_size: number of tokens without padding.
        group: the tensor-parallel group. Two small all-reduces per block, the vocabulary is never gathered.
        gradient: float32 [n], the loss's gradient in the log-probs, if it is known before them.
        tied: whether ``weight`` is the embedding of this same stage, whose gradient is added by autograd.

    Returns:
        float32 [n].

    Raises:
        RuntimeError: in the backward pass, if the gradient is another than the one given.
    """
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    shape = _Shape(vocab_size, group, weight, tied)
    result: torch.Tensor = _TargetLogProbs.apply(hidden, weight, targets, shape, gradient if needs_gradients else None)
    return result


class _Shape:
    """What both directions need to know of the weight's share and of where its gradient goes."""

    def __init__(self, vocab_size: int, group: dist.ProcessGroup, weight: torch.Tensor, tied: bool) -> None:
        num_columns = weight.shape[0]
        self.group = group
        self.tied = tied
        self.first = group.rank() * num_columns
        self.num_valid = num_valid_columns(num_columns, vocab_size, group.rank())
        block = _BLOCK_LOGITS[weight.device.type]
        self.rows_per_block = max(_MIN_ROWS, block // num_columns)
        self.main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)

    def blocks(self, num_positions: int) -> list[slice]:
        """Positions of each block."""
        starts = range(0, num_positions, self.rows_per_block)
        return [slice(start, min(start + self.rows_per_block, num_positions)) for start in starts]


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        shape: _Shape,
        gradient: torch.Tensor | None,
    ) -> torch.Tensor:
        log_probs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty_like(log_probs)
        grads = None if gradient is None else _Gradients(hidden, weight, shape)
        for block in shape.blocks(len(targets)):
            exponentials = _logits(hidden[block], weight, shape)
            chosen, shifts = _exponentiate(exponentials, targets[block], shape)
            log_sums[block], log_probs[block] = _normalize(exponentials, chosen, shifts, shape)
            if grads is not None and gradient is not None:
                scale = -gradient[block] * (shifts - log_sums[block]).exp()
                _to_gradient(exponentials, scale, targets[block], gradient[block], shape)
                grads.add(block, exponentials)
        ctx.shape, ctx.gradients = shape, grads
        ctx.save_for_backward(hidden, weight, targets, log_sums, gradient)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, log_sums, gradient = ctx.saved_tensors
        shape, grads = ctx.shape, ctx.gradients
        if grads is not None:
            ctx.gradients = None
            _check_equal(grad_outputs[0], gradient)
        else:
            grads = _Gradients(hidden, weight, shape)
            for block in shape.blocks(len(targets)):
                exponentials = _logits(hidden[block], weight, shape).sub_(log_sums[block].unsqueeze(-1)).exp_()
                received = grad_outputs[0][block]
                _to_gradient(exponentials, -received, targets[block], received, shape)
                grads.add(block, exponentials)
        return *grads.finish(), None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, shape: _Shape) -> torch.Tensor:
    """float32 [rows, r], of products in the model's precision; the padded columns are never computed."""
    return linear(hidden, weight[: shape.num_valid]).float()


def _exponentiate(logits: torch.Tensor, targets: torch.Tensor, shape: _Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites logits [rows, r] with exp(logit - shift); returns the target's logit (0 on other ranks) and the shift,
    both [rows]."""
    if not shape.num_valid:  # a rank whose columns are all padding
        return torch.zeros(targets.shape, device=targets.device), torch.zeros(targets.shape, device=targets.device)
    local, elsewhere = _local(targets, shape)
    chosen = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill_(elsewhere, 0.0)
    shifts = logits.amax(dim=-1)
    logits.sub_(shifts.unsqueeze(-1)).exp_()
    return chosen, shifts


def _normalize(
    exponentials: torch.Tensor, chosen: torch.Tensor, shifts: torch.Tensor, shape: _Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of the denominator and log-prob of the target, [rows] each, over all ranks' columns."""
    log_sums = shifts + exponentials.sum(dim=-1).log()  # -inf on a rank of padding only
    if shape.group.size() > 1:
        highest = log_sums.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shape.group)
        sums = torch.stack(((log_sums - highest).exp(), chosen))
        dist.all_reduce(sums, group=shape.group)
        log_sums, chosen = highest + sums[0].log(), sums[1]
    return log_sums, chosen - log_sums


def _to_gradient(
    exponentials: torch.Tensor, scale: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor, shape: _Shape
) -> None:
    """Overwrites [rows, r] with the logits' gradient, gradient * (one-hot - softmax); ``scale`` [rows] makes the
    exponentials into -gradient * softmax."""
    if not shape.num_valid:
        return
    local, elsewhere = _local(targets, shape)
    exponentials.mul_(scale.unsqueeze(-1))
    exponentials.scatter_add_(-1, local.unsqueeze(-1), gradient.masked_fill(elsewhere, 0.0).unsqueeze(-1))


def _local(targets: torch.Tensor, shape: _Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Column on this rank (0 if it has none), and whether it is another rank's."""
    local = targets - shape.first
    elsewhere = (local < 0) | (local >= shape.num_valid)
    return local.masked_fill_(elsewhere, 0), elsewhere


def _check_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch._assert_async(
        torch.isclose(found, expected, rtol=1e-5, atol=0.0, equal_nan=True).all(),
        "the gradient of the log-probs is not the one that was announced: is the objective linear in them?",
    )


class _Gradients:
    """Collects the gradients of hidden states and weight, block by block."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, shape: _Shape) -> None:
        self._hidden, self._weight, self._shape = hidden.detach(), weight, shape
        self._of_hidden = torch.empty_like(self._hidden, memory_format=torch.contiguous_format)
        self._of_weight = shape.main_grad
        if self._of_weight is None:
            self._of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def add(self, block: slice, of_logits: torch.Tensor) -> None:
        """``of_logits``: float32 [rows, r] of the block's positions."""
        of_logits, inputs = of_logits.to(self._hidden.dtype), self._hidden[block]
        num_valid = self._shape.num_valid
        self._of_hidden[block] = linear(of_logits, self._weight[:num_valid].t())
        assert self._of_weight is not None
        step = max(1, _WEIGHT_BLOCK // inputs.shape[1])
        for start in range(0, num_valid, step):
            columns = slice(start, min(start + step, num_valid))
            self._of_weight[columns] += linear(of_logits[:, columns].t(), inputs.t())

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients for autograd, of hidden states (summed over the ranks) and weight."""
        if self._shape.group.size() > 1:
            dist.all_reduce(self._of_hidden, group=self._shape.group)
        weight = self._weight
        assert self._of_weight is not None
        if self._shape.main_grad is None:
            return self._of_hidden, self._of_weight.to(weight.dtype)
        if self._shape.tied:  # autograd adds the embedding's to these
            return self._of_hidden, torch.zeros_like(weight)
        # As Megatron's fused accumulation does it: a gradient that nobody reads sets off the parameter's hook.
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return self._of_hidden, torch.empty_like(weight)
