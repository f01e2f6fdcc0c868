"""Log-probabilities of given tokens straight from hidden states: the logits exist a block of positions at a time.

Forward, a block's logits are reduced to the softmax's denominator and the target's logit. Backward they are computed
again, which costs one more product for the output layer; storing them would cost a tensor [n, v], the largest of the
whole step. Where the loss is linear in the log-probs its gradient is known beforehand, and one visit to each block
does both directions with nothing computed twice.

    n positions    H hidden size    v vocabulary columns of this rank, of which the first r are tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sip.distributed import linear, mark_as_added, writes_into
from megatron_sip.model.logprobs import num_valid_columns

_MIN_ROWS = 128
"""Positions that a block may always have: with fewer, adding to the weight's gradient costs more than computing it."""
_STEP = 16
"""Positions of a block are a multiple of it: a vector unit's width."""
_TILE_LOGITS = 2**18
"""Logits that are exponentiated at a time on CPU, in float32: 1 MiB, which a core's cache holds."""


@dataclass(frozen=True)
class _Sizes:
    share: int
    """A block is about this part of the positions, within the limits below: small beside the whole tensor of logits,
    whose memory is what the blocks are there to save."""
    least_bytes: int
    """Of a block's logits in the model's precision: they may always be as many."""
    most_bytes: int
    """More only for the sake of ``_MIN_ROWS``."""
    weight_block: int
    """Entries of the weight's gradient that are computed and added at a time."""


_SIZES = {
    # Above 32 MiB every block's memory comes anew from the system, page by page; the weight's part fits a cache. An
    # eighth of 512 positions at a vocabulary of 128,256 would be just below, in the heap, where such blocks leave holes
    # that the next do not fit: 128 MiB in place of 56.
    "cpu": _Sizes(7, 24 * 2**20, 24 * 2**20, 2**20),
    # It needs more to be busy.
    "cuda": _Sizes(8, 2**24, 2**26, 2**22),
}


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
        self.sizes = _SIZES[weight.device.type]
        self.row_bytes = num_columns * weight.element_size()
        # A GPU wants few kernels; ranks that share the vocabulary would meet for every tile.
        whole = weight.device.type != "cpu" or group.size() > 1
        self.rows_per_tile: int | None = None if whole else max(1, _TILE_LOGITS // num_columns)
        self.main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)

    def blocks(self, num_positions: int) -> list[slice]:
        """Positions of each block."""
        return _cut(num_positions, _rows_per_block(self.sizes, num_positions, self.row_bytes))

    def tiles(self, num_rows: int) -> list[slice]:
        """Rows of a block that are exponentiated together."""
        return _cut(num_rows, self.rows_per_tile or max(1, num_rows))


def _rows_per_block(sizes: _Sizes, num_positions: int, row_bytes: int) -> int:
    share = -(-num_positions // sizes.share)
    most = max(sizes.most_bytes // row_bytes, _MIN_ROWS)
    rows = min(max(share, sizes.least_bytes // row_bytes, 1), most)
    num_blocks = max(1, -(-num_positions // rows))
    even = -(-num_positions // num_blocks)
    return min(most, -(-even // _STEP) * _STEP)


def _cut(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, max(1, step))]


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
        blocks = _Blocks(hidden, weight, shape)
        for block in blocks.positions:
            wanted = None if gradient is None else gradient[block]
            logits = blocks.logits(block)
            log_sums[block], log_probs[block] = _reduce(logits, targets[block], wanted, shape)
            if grads is not None:
                grads.add(block, logits)
            del logits  # else the next block's come beside them
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
            blocks = _Blocks(hidden, weight, shape)
            for block in blocks.positions:
                logits = blocks.logits(block)
                _reduce_to_gradient(logits, log_sums[block], targets[block], grad_outputs[0][block], shape)
                grads.add(block, logits)
                del logits
        return *grads.finish(), None, None, None


class _Blocks:
    """Computes the logits of one block after the other, in the same memory where the kernel can write there: blocks of
    their own leave holes in a CPU's heap that the next do not fit."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, shape: _Shape) -> None:
        self.positions = shape.blocks(len(hidden))
        self._hidden, self._weight = hidden.detach(), weight.detach()[: shape.num_valid]
        self._memory: torch.Tensor | None = None
        if self.positions and writes_into(self._hidden, self._weight):
            self._memory = hidden.new_empty(self.positions[0].stop, shape.num_valid)

    def logits(self, block: slice) -> torch.Tensor:
        """[rows, r] in the model's precision, until the next call; the padded columns are never computed."""
        out = None if self._memory is None else self._memory[: block.stop - block.start]
        return linear(self._hidden[block], self._weight, out=out)


def _reduce(
    logits: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None, shape: _Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, r] -> logarithm of the denominator and log-prob of the target, float32 [rows] each. The logits are
    overwritten, with their gradient if ``gradient`` [rows], that of the log-probs, is given."""
    log_sums = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    log_probs = torch.empty_like(log_sums)
    for tile in shape.tiles(len(targets)):
        exponentials = logits[tile].float()  # float32 logits themselves, a copy of others
        chosen, shifts = _exponentiate(exponentials, targets[tile], shape)
        log_sums[tile], log_probs[tile] = _normalize(exponentials, chosen, shifts, shape)
        if gradient is not None:
            scale = -gradient[tile] * (shifts - log_sums[tile]).exp()
            _to_gradient(exponentials, scale, targets[tile], gradient[tile], shape)
            _write_back(exponentials, logits[tile])
    return log_sums, log_probs


def _reduce_to_gradient(
    logits: torch.Tensor, log_sums: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor, shape: _Shape
) -> None:
    """Overwrites logits [rows, r], whose denominators are known, with their gradient."""
    for tile in shape.tiles(len(targets)):
        exponentials = logits[tile].float().sub_(log_sums[tile].unsqueeze(-1)).exp_()
        _to_gradient(exponentials, -gradient[tile], targets[tile], gradient[tile], shape)
        _write_back(exponentials, logits[tile])


def _write_back(values: torch.Tensor, logits: torch.Tensor) -> None:
    if values.dtype != logits.dtype:
        logits.copy_(values)


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
        """``of_logits``: [rows, r] of the block's positions, in the model's precision."""
        inputs = self._hidden[block]
        num_valid = self._shape.num_valid
        self._of_hidden[block] = linear(of_logits, self._weight[:num_valid].t())
        assert self._of_weight is not None
        step = max(1, self._shape.sizes.weight_block // inputs.shape[1])
        for start in range(0, num_valid, step):
            columns = slice(start, min(start + step, num_valid))
            # Not +=, which after the addition copies the part over itself.
            self._of_weight[columns].add_(linear(of_logits[:, columns].t(), inputs.t()))

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients for autograd, of hidden states (summed over the ranks) and weight."""
        if self._shape.group.size() > 1:
            dist.all_reduce(self._of_hidden, group=self._shape.group)
        weight = self._weight
        assert self._of_weight is not None
        if self._shape.main_grad is None:
            return self._of_hidden, self._of_weight.to(weight.dtype)
        if self._shape.tied:  # autograd adds the embedding's to these
            return self._of_hidden, torch.zeros_like(weight)
        mark_as_added(weight)
        return self._of_hidden, None
