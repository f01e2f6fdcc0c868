"""Core attention that asks a plan, and the two plans of training.

Shapes: s row length, b rows, h query heads and g key-value heads of this rank, d head width, P prefix block,
C candidates, T candidate block.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.types import AttentionPlan, RowLayout


class PlannedAttention(torch.nn.Module):
    """The core-attention module of every layer: hands queries, keys and values to the forward pass's plan.

    The plan arrives as the argument that Megatron calls ``attention_bias``, which passes through all layers untouched.
    So it belongs to one forward pass, and survives recomputation with several micro-batches in flight.
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
        return _merge_heads(_attend(*map(_heads_first, (query, key, value))))


class SharedPrefixPlan:
    """Rows of ``[prefix | candidate 1 | ... | candidate C]``: equal to C separate sequences of prefix and candidate.

    The prefix block is attended causally once. Then each candidate attends to its row's prefix, as far as that is real,
    and causally to itself. No mask is larger than [B * C, 1, T, P + T].

    Args:
        layout: widths of the blocks.
        prefix_lengths: int64 [B], each in 1..P.
    """

    def __init__(self, layout: RowLayout, prefix_lengths: torch.Tensor) -> None:
        self.layout = layout
        self.mask = _candidate_mask(layout, prefix_lengths) if layout.num_candidates else None

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``AttentionPlan``."""
        width = self.layout.prefix_block
        queries, keys, values = map(_heads_first, (query, key, value))  # [b, h or g, s, d]
        # A prefix is padded at the right, so that causality keeps its padding out.
        prefix = _attend(queries[:, :, :width], keys[:, :, :width], values[:, :, :width])
        if self.mask is None:
            return _merge_heads(prefix)
        candidates = _attend(
            self._candidates(queries[:, :, width:]),
            torch.cat((self._for_each_candidate(keys[:, :, :width]), self._candidates(keys[:, :, width:])), dim=2),
            torch.cat((self._for_each_candidate(values[:, :, :width]), self._candidates(values[:, :, width:])), dim=2),
            self.mask,
        )
        return _merge_heads(torch.cat((prefix, self._row(candidates)), dim=2))

    def _candidates(self, x: torch.Tensor) -> torch.Tensor:
        """[b, h, C * T, d] -> [b * C, h, T, d]."""
        rows, heads, _, channels = x.shape
        count, block = self.layout.num_candidates, self.layout.candidate_block
        split = x.reshape(rows, heads, count, block, channels).transpose(1, 2)
        return split.reshape(rows * count, heads, block, channels)

    def _for_each_candidate(self, x: torch.Tensor) -> torch.Tensor:
        """[b, g, P, d] -> [b * C, g, P, d], the same for every candidate of a row."""
        return x.repeat_interleave(self.layout.num_candidates, dim=0)

    def _row(self, x: torch.Tensor) -> torch.Tensor:
        """[b * C, h, T, d] -> [b, h, C * T, d]."""
        _, heads, block, channels = x.shape
        count = self.layout.num_candidates
        split = x.reshape(-1, count, heads, block, channels).transpose(1, 2)
        return split.reshape(-1, heads, count * block, channels)


def _candidate_mask(layout: RowLayout, prefix_lengths: torch.Tensor) -> torch.Tensor:
    """Which of prefix and own block a candidate's token attends to: bool [B * C, 1, T, P + T]."""
    device, block, rows = prefix_lengths.device, layout.candidate_block, prefix_lengths.shape[0]
    real = torch.arange(layout.prefix_block, device=device) < prefix_lengths[:, None]  # [B, P]
    causal = torch.ones(block, block, dtype=torch.bool, device=device).tril()
    mask = torch.cat((real[:, None].expand(rows, block, -1), causal.expand(rows, block, block)), dim=2)
    return mask.repeat_interleave(layout.num_candidates, dim=0).unsqueeze(1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[b, h, q, d], [b, g, k, d], [b, g, k, d] -> [b, h, q, d]; causal without a mask."""
    if mask is not None and query.is_cuda and query.shape[1] != key.shape[1]:
        # On CUDA the one fused kernel that takes a mask does not share key-value heads.
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[s, b, h, d] -> [b, h, s, d]."""
    return x.permute(1, 2, 0, 3)


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[b, h, s, d] -> [s, b, h * d]."""
    return x.permute(2, 0, 1, 3).flatten(2)
