"""Key-value cache of a batch of rollouts: the prefix's keys and values stand once, whatever the number of its rollouts.

    G  prefixes (groups) of a batch      K  slots of a group, one per rollout   R  rows = G * K, group by group
    P  width of the prefixes             T  most new tokens                     t  new tokens cached so far
    h, g, d  attention heads, key-value groups and head width of this rank      q  query heads per group, h / g

Keys are stored after RoPE, so that a decode step rotates one token per row. A decode step's queries attend to the
prefix in one product per (prefix, group) for all its slots together, and to their own tokens in one per (row, group).
"""

from __future__ import annotations

import math
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
        self._num_cached = -1
        """Own tokens per row whose keys stood before this pass; -1 in the prefill."""
        self._mask: torch.Tensor | None = None

    def start_decode_step(self) -> None:
        """To be called before each pass that follows the prefill."""
        assert self._num_cached < self._max_new_tokens
        self._num_cached += 1

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h * d]; see ``AttentionPlan``."""
        if self._num_cached < 0:
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
        self._mask = None

    def _prefill(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention; padding stands at the right, where no real token sees it."""
        width, num_groups, heads, depth = key.shape
        batch_query, batch_key, batch_value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        rows = num_groups * self._num_slots
        self._layers[layer] = _LayerCache(
            prefix_key=key.permute(1, 2, 3, 0).reshape(num_groups * heads, depth, width).contiguous(),
            prefix_value=batch_value.reshape(num_groups * heads, width, depth).contiguous(),
            own_key=key.new_empty((rows * heads, self._max_new_tokens, depth)),
            own_value=key.new_empty((rows * heads, self._max_new_tokens, depth)),
        )
        output = F.scaled_dot_product_attention(
            batch_query, batch_key, batch_value, is_causal=True, enable_gqa=query.shape[2] != heads
        )
        return output.permute(2, 0, 1, 3).reshape(width, num_groups, -1)

    def _decode(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cache, t = self._layers[layer], self._num_cached
        padded_rows, _, num_heads, depth = query.shape
        heads = key.shape[2]
        shared = num_heads // heads
        num_groups, num_slots = len(self._prefix_lengths), self._num_slots
        rows = num_groups * num_slots

        cache.own_key[:, t] = key[:rows].reshape(rows * heads, depth)
        cache.own_value[:, t] = value[:rows].reshape(rows * heads, depth)
        own_key, own_value = cache.own_key[:, : t + 1], cache.own_value[:, : t + 1]

        own_query = query[:rows].reshape(rows * heads, shared, depth)
        prefix_query = _by_group(own_query, num_groups, num_slots, heads)
        scale = 1.0 / math.sqrt(depth)
        mask = self._prefix_mask(cache.prefix_key, heads)
        prefix_scores = torch.baddbmm(mask, prefix_query, cache.prefix_key, alpha=scale)
        own_scores = torch.bmm(own_query, own_key.transpose(1, 2)) * scale
        width = prefix_scores.shape[-1]
        scores = torch.cat([_by_row(prefix_scores, num_groups, num_slots, heads), own_scores], dim=-1)
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)

        prefix_part = torch.bmm(_by_group(probabilities[..., :width], num_groups, num_slots, heads), cache.prefix_value)
        output = torch.baddbmm(
            _by_row(prefix_part, num_groups, num_slots, heads), probabilities[..., width:], own_value
        ).view(rows, 1, num_heads * depth)
        return output if padded_rows == rows else F.pad(output, (0, 0, 0, 0, 0, padded_rows - rows))

    def _prefix_mask(self, prefix_key: torch.Tensor, heads: int) -> torch.Tensor:
        """[G * g, 1, P]: 0 on a prefix's tokens, -inf on its padding."""
        if self._mask is None:
            columns = torch.arange(prefix_key.shape[2], device=prefix_key.device)
            padding = columns[None] >= self._prefix_lengths[:, None]
            mask = torch.zeros(padding.shape, dtype=prefix_key.dtype, device=prefix_key.device)
            self._mask = mask.masked_fill_(padding, -torch.inf).repeat_interleave(heads, dim=0)[:, None, :]
        return self._mask


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
