"""Log-probabilities of given tokens from logits whose vocabulary is split over the tensor-parallel ranks.

Megatron's own cross-entropy overwrites float32 logits and, in its backward, the softmax it saved, and it counts padded
vocabulary columns. This one does neither, and keeps the logits in place of a float32 softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def mask_padded_vocabulary(logits: torch.Tensor, vocab_size: int, rank: int) -> torch.Tensor:
    """Logits [..., V / tp] of tensor-parallel rank ``rank`` with -inf in the columns that are no token."""
    num_valid = num_valid_columns(logits.shape[-1], vocab_size, rank)
    if num_valid == logits.shape[-1]:
        return logits
    padded = torch.arange(logits.shape[-1], device=logits.device) >= num_valid
    return logits.masked_fill(padded, -torch.inf)


def num_valid_columns(num_columns: int, vocab_size: int, rank: int) -> int:
    """How many of a rank's ``num_columns`` vocabulary columns are tokens; they stand first."""
    return min(max(vocab_size - rank * num_columns, 0), num_columns)


def vocab_parallel_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """log softmax(logits)[target], of the untruncated softmax at temperature 1 over the real vocabulary.

    Args:
        logits: [..., V / tp], this rank's columns, float32 or bfloat16; left as they are.
        targets: int64 [...], global token ids below ``vocab_size``.
        vocab_size: number of tokens without padding.
        group: the tensor-parallel group. Two small all-reduces; the vocabulary is never gathered.

    Returns:
        float32 [...].
    """
    result: torch.Tensor = _LogProbs.apply(logits, targets, vocab_size, group)
    return result


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        num_columns = logits.shape[-1]
        rank = group.rank()
        num_valid = num_valid_columns(num_columns, vocab_size, rank)
        real = logits[..., :num_valid].float()
        # A rank whose columns are all padding has nothing to take a maximum of.
        highest = real.amax(dim=-1) if num_valid else real.new_full(targets.shape, -torch.inf)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)

        local = targets - rank * num_columns
        elsewhere = (local < 0) | (local >= num_valid)
        local = local.masked_fill(elsewhere, 0)
        if num_valid:
            chosen = real.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        else:
            chosen = torch.zeros_like(highest)
        sums = torch.stack(((real - highest.unsqueeze(-1)).exp().sum(dim=-1), chosen))
        dist.all_reduce(sums, group=group)
        log_normalizer = highest + sums[0].log()

        ctx.save_for_backward(logits, log_normalizer, local, elsewhere)
        ctx.num_valid = num_valid
        return sums[1] - log_normalizer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, log_normalizer, local, elsewhere = ctx.saved_tensors
        scale = grad_outputs[0].unsqueeze(-1)
        grad = torch.zeros_like(logits, dtype=torch.float32)
        if ctx.num_valid:
            real = grad[..., : ctx.num_valid]
            torch.sub(logits[..., : ctx.num_valid].float(), log_normalizer.unsqueeze(-1), out=real)
            real.exp_().mul_(-scale)
            real.scatter_add_(-1, local.unsqueeze(-1), scale.masked_fill(elsewhere.unsqueeze(-1), 0.0))
        return grad.to(logits.dtype), None, None, None
