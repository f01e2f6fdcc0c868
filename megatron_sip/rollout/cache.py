"""Key-value cache of a batch of rollouts: the prefix's keys and values stand once, whatever the number of its rollouts.

    G  prefixes (groups) of a batch      K  slots of a group, one per rollout   R  rows = G * K, group by group
    P  width of the prefixes             T  most new tokens                     W  own tokens looked at, 1..T
    h, g, d  attention heads, key-value groups and head width of this rank      q  query heads per group, h / g

Keys are stored after RoPE, so that a decode step rotates one token per row. A decode step's queries attend to the
prefix in one product per (prefix, group) for all its slots together, and to their own tokens in one per (row, group).
Where a step stands is a tensor, and own tokens are masked by it within a width that changes seldom: a step is then the
same kernels on the same memory as the one before, which a GPU can repeat from a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class _LayerCache:
    """Keys and values of one layer."""

    prefix_key: torch.Tensor
    """[G * g, d, P]: transposed once, for it is read in every step."""
    prefix_value: torch.Tensor
    """[G * g, P, d]."""
    own_key: torch.Tensor
    """[R * g, T, d]."""
    own_value: torch.Tensor
    """[R * g, T, d]."""


class RolloutCache:
    """An AttentionPlan with memory.

    The first pass through the layers is the prefill [P, G]; each later one is a decode step of one token per row, with
    rows as the sequence dimension, [R or more, 1]: sequence parallelism can split that.
    """

    def __init__(self, prefix_lengths: torch.Tensor, num_slots: int, max_new_tokens: int) -> None:
        """``prefix_lengths``: int64 [G], on the device of the keys."""
        self._prefix_lengths = prefix_lengths
        self._num_slots = num_slots
        self._max_new_tokens = max_new_tokens
        self._layers: dict[int, _LayerCache] = {}
        self._slot: torch.Tensor | None = None
        """int64 [1]: where this pass's tokens stand among the own ones; None in the prefill."""
        self._prefix_mask: torch.Tensor | None = None
        """[G * g, 1, P]: 0 on a prefix's tokens, -inf on its padding."""
        self._causal: torch.Tensor | None = None
        """[T, T]: row t is 0 up to t, -inf beyond."""
        self._own_mask: torch.Tensor | None = None
        """[1, 1, W]: this pass's row of it."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self._prefix_lengths) * self._num_slots

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values there is memory for."""
        widths = [cache.prefix_value.shape[1] for cache in self._layers.values()][:1]
        return len(self._prefix_lengths) * sum(widths) + self.num_rows * self._max_new_tokens

    def start_decode_step(self, slot: torch.Tensor, width: int) -> None:
        """To be called before each pass that follows the prefill.

        ``slot``: int64 [1] on the device, new tokens cached per row so far; ``width``: W, more than that many.
        """
        assert self._causal is not None and width <= self._max_new_tokens
        self._slot = slot
        self._own_mask = self._causal[:, :width].index_select(0, slot)[None]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d]; see ``AttentionPlan``."""
        if self._slot is None:
            return self._prefill(layer, query, key, value)
        return self._decode(layer, query, key, value)

    def select(self, groups: torch.Tensor, slots: torch.Tensor) -> None:
        """Keeps the old groups ``groups``, int64 [G'], and of each of them the old slots ``slots``, int64 [G', K']."""
        num_groups = len(self._prefix_lengths)
        rows = (groups[:, None] * self._num_slots + slots).flatten()
        for cache in self._layers.values():
            heads = cache.prefix_key.shape[0] // num_groups
            cache.prefix_key = _pick(cache.prefix_key, groups, heads)
            cache.prefix_value = _pick(cache.prefix_value, groups, heads)
            cache.own_key = _pick(cache.own_key, rows, heads)
            cache.own_value = _pick(cache.own_value, rows, heads)
        self._prefix_lengths = self._prefix_lengths[groups]
        self._num_slots = slots.shape[1]
        self._prefix_mask = None

    def _prefill(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention; padding stands at the right, where no real token sees it."""
        width, num_groups, heads, depth = key.shape
        batch_query, batch_key, batch_value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        rows = num_groups * self._num_slots
        self._layers[layer] = _LayerCache(
            prefix_key=key.permute(1, 2, 3, 0).reshape(num_groups * heads, depth, width).contiguous(),
            prefix_value=batch_value.reshape(num_groups * heads, width, depth).contiguous(),
            # Zeros, for what is masked is still multiplied, and memory as it comes may hold NaN.
            own_key=key.new_zeros((rows * heads, self._max_new_tokens, depth)),
            own_value=key.new_zeros((rows * heads, self._max_new_tokens, depth)),
        )
        if self._causal is None:
            shape = (self._max_new_tokens, self._max_new_tokens)
            self._causal = torch.full(shape, -torch.inf, dtype=key.dtype, device=key.device).triu_(1)
        output = F.scaled_dot_product_attention(
            batch_query, batch_key, batch_value, is_causal=True, enable_gqa=query.shape[2] != heads
        )
        return output.permute(2, 0, 1, 3).reshape(width, num_groups, -1)

    def _decode(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cache, slot, own_mask = self._layers[layer], self._slot, self._own_mask
        assert slot is not None and own_mask is not None
        padded_rows, _, num_heads, depth = query.shape
        heads = key.shape[2]
        shared = num_heads // heads
        num_groups, num_slots = len(self._prefix_lengths), self._num_slots
        rows = num_groups * num_slots

        cache.own_key.index_copy_(1, slot, key[:rows].reshape(rows * heads, 1, depth))
        cache.own_value.index_copy_(1, slot, value[:rows].reshape(rows * heads, 1, depth))
        own_width = own_mask.shape[-1]
        own_key, own_value = cache.own_key[:, :own_width], cache.own_value[:, :own_width]

        own_query = query[:rows].reshape(rows * heads, shared, depth)
        prefix_query = _by_group(own_query, num_groups, num_slots, heads)
        scale = 1.0 / math.sqrt(depth)
        mask = self._mask_of_prefixes(cache.prefix_key, heads)
        prefix_scores = torch.baddbmm(mask, prefix_query, cache.prefix_key, alpha=scale)
        own_scores = torch.baddbmm(own_mask, own_query, own_key.transpose(1, 2), alpha=scale)
        width = prefix_scores.shape[-1]
        scores = torch.cat([_by_row(prefix_scores, num_groups, num_slots, heads), own_scores], dim=-1)
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)

        prefix_part = torch.bmm(_by_group(probabilities[..., :width], num_groups, num_slots, heads), cache.prefix_value)
        output = torch.baddbmm(
            _by_row(prefix_part, num_groups, num_slots, heads), probabilities[..., width:], own_value
        ).view(rows, 1, num_heads * depth)
        return output if padded_rows == rows else F.pad(output, (0, 0, 0, 0, 0, padded_rows - rows))

    def _mask_of_prefixes(self, prefix_key: torch.Tensor, heads: int) -> torch.Tensor:
        if self._prefix_mask is None:
            columns = torch.arange(prefix_key.shape[2], device=prefix_key.device)
            padding = columns[None] >= self._prefix_lengths[:, None]
            mask = torch.zeros(padding.shape, dtype=prefix_key.dtype, device=prefix_key.device)
            self._prefix_mask = mask.masked_fill_(padding, -torch.inf).repeat_interleave(heads, dim=0)[:, None, :]
        return self._prefix_mask


class JointCache:
    """An AttentionPlan for a decode step of the rows of several caches, one after the other."""

    def __init__(self, caches: Sequence[RolloutCache]) -> None:
        self._caches = caches

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``AttentionPlan``; rows beyond those of the caches are padding."""
        if len(self._caches) == 1:
            return self._caches[0].attend(layer, query, key, value)
        sizes = [cache.num_rows for cache in self._caches]
        padding = len(query) - sum(sizes)
        parts = zip(*(tensor.split([*sizes, padding]) for tensor in (query, key, value)), strict=True)
        outputs = [cache.attend(layer, *part) for cache, part in zip(self._caches, parts, strict=False)]
        return F.pad(torch.cat(outputs), (0, 0, 0, 0, 0, padding))


def _pick(tensor: torch.Tensor, indices: torch.Tensor, heads: int) -> torch.Tensor:
    """[n * g, a, b] -> [n' * g, a, b]."""
    return tensor.unflatten(0, (-1, heads)).index_select(0, indices).flatten(0, 1)


def _by_group(tensor: torch.Tensor, num_groups: int, num_slots: int, heads: int) -> torch.Tensor:
    """[R * g, q, x] -> [G * g, K * q, x]; a view where K or g is 1."""
    shared, width = tensor.shape[1:]
    split = tensor.view(num_groups, num_slots, heads, shared, width)
    return split.transpose(1, 2).reshape(num_groups * heads, num_slots * shared, width)


def _by_row(tensor: torch.Tensor, num_groups: int, num_slots: int, heads: int) -> torch.Tensor:
    """[G * g, K * q, x] -> [R * g, q, x]."""
    width = tensor.shape[-1]
    split = tensor.view(num_groups, heads, num_slots, -1, width)
    return split.transpose(1, 2).reshape(num_groups * num_slots * heads, -1, width)
