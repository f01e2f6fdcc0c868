"""Core attention that asks a plan, and the two plans of training.

Shapes: s row length, b rows, h query heads and g key-value heads of this rank, d head width, P prefix block,
C candidates, T candidate block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.model.flash import attend, attend_backward
from megatron_sip.types import AttentionPlan, RowLayout


class PlannedAttention(torch.nn.Module):
    """The core-attention module of every layer: hands queries, keys and values to the forward pass's plan.

    The plan arrives as the argument that Megatron calls ``attention_bias`` (``layers.py``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **unused: object,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d]."""
        plan = cast(AttentionPlan, attention_bias)
        return plan.attend(self.layer_number, query, key, value)


class CausalPlan:
    """Every token attends to itself and to what stands before it in its row."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``AttentionPlan``."""
        query, key, value = map(_heads_first, (query, key, value))
        shared = query.shape[1] != key.shape[1]
        return _merge_heads(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared))


class SharedPrefixPlan:
    """Rows of ``[prefix | candidate 1 | ... | candidate C]``: equal to C separate sequences of prefix and candidate.

    The prefix is attended causally once. All candidates of a row attend to its prefix, as far as that is real, in one
    call without a mask and without a copy of its keys, and each causally to itself in another; both are put together
    by their denominators (``flash.py``).

    Args:
        layout: widths of the blocks.
        prefix_lengths: int64 [B], each in 1..P, best on the host: they are read here.
    """

    def __init__(self, layout: RowLayout, prefix_lengths: torch.Tensor) -> None:
        self.layout = layout
        self.prefix_lengths: list[int] = prefix_lengths.tolist()

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``AttentionPlan``."""
        if not self.layout.num_candidates:
            return CausalPlan().attend(layer, query, key, value)
        result: torch.Tensor = _SharedPrefixAttention.apply(query, key, value, self.layout, self.prefix_lengths)
        return result.flatten(2)


class _SharedPrefixAttention(torch.autograd.Function):
    """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h, d].

    A prefix block is padded at the right, so that causality keeps its padding out of what is real.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, lengths: list[int]
    ) -> torch.Tensor:
        width = layout.prefix_block
        output = query.new_empty(query.shape)
        queries, keys, values, outputs = map(_heads_first, (query, key, value, output))
        of_prefix, prefix_log_sum = attend(queries[:, :, :width], keys[:, :, :width], values[:, :, :width], causal=True)
        outputs[:, :, :width] = of_prefix
        own, own_log_sum = attend(*(_blocks(x, layout) for x in (query, key, value)), causal=True)
        own = own.unflatten(0, (-1, layout.num_candidates)).transpose(1, 2).flatten(2, 3)  # [b, h, C * T, d]
        own_log_sum = own_log_sum.unflatten(0, (-1, layout.num_candidates)).transpose(1, 2).flatten(2)
        log_sums = []
        for rows, length in _alike(lengths):
            shared, log_sum = attend(
                queries[rows, :, width:], keys[rows, :, :length], values[rows, :, :length], causal=False
            )
            share = (own_log_sum[rows] - log_sum).sigmoid().unsqueeze(-1)  # of a candidate's own keys in the whole
            outputs[rows, :, width:] = torch.lerp(shared.float(), own[rows].float(), share)
            log_sums.append(torch.logaddexp(own_log_sum[rows], log_sum))
        ctx.layout, ctx.lengths = layout, lengths
        ctx.save_for_backward(query, key, value, output, prefix_log_sum, torch.cat(log_sums))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, prefix_log_sum, log_sums = ctx.saved_tensors
        layout, grad = ctx.layout, grad_outputs[0]
        width, count = layout.prefix_block, layout.num_candidates
        queries, keys, values, outputs, grads = map(_heads_first, (query, key, value, output, grad))
        results = tuple(x.new_empty(x.shape) for x in (query, key, value))
        grad_queries, grad_keys, grad_values = map(_heads_first, results)

        block_log_sums = log_sums.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)  # [b * C, h, T]
        of_blocks = attend_backward(
            block_log_sums, *(_blocks(x, layout) for x in (grad, query, key, value, output)), causal=True
        )
        for result, part in zip((grad_queries, grad_keys, grad_values), of_blocks, strict=True):
            result[:, :, width:] = part.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)
        first = slice(None, width)
        of_prefix = attend_backward(
            prefix_log_sum, *(x[:, :, first] for x in (grads, queries, keys, values, outputs)), causal=True
        )
        for result, part in zip((grad_queries, grad_keys, grad_values), of_prefix, strict=True):
            result[:, :, first] = part
        for rows, length in _alike(ctx.lengths):
            of_queries, of_keys, of_values = attend_backward(
                log_sums[rows], grads[rows, :, width:], queries[rows, :, width:], keys[rows, :, :length],
                values[rows, :, :length], outputs[rows, :, width:], causal=False,
            )  # fmt: skip
            # Not +=, which after the addition copies the part over itself.
            grad_queries[rows, :, width:].add_(of_queries)
            grad_keys[rows, :, :length].add_(of_keys)
            grad_values[rows, :, :length].add_(of_values)
        return *results, None, None


def _alike(lengths: list[int]) -> Iterator[tuple[slice, int]]:
    """Neighbouring rows of equal prefixes, which one call serves (all rows, where prefixes are cut at one length)."""
    start = 0
    for length, rows in groupby(lengths):
        stop = start + len(list(rows))
        yield slice(start, stop), length
        start = stop


def _blocks(x: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """The candidates' part of [s, b, n, d] as rows of their own, [b * C, n, T, d]; a view where b is 1."""
    split = x[layout.prefix_block :].unflatten(0, (layout.num_candidates, -1))  # [C, T, b, n, d]
    return split.permute(2, 0, 3, 1, 4).flatten(0, 1)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[s, b, h, d] -> [b, h, s, d]."""
    return x.permute(1, 2, 0, 3)


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[b, h, s, d] -> [s, b, h * d]."""
    return x.permute(2, 0, 1, 3).flatten(2)
