"""Host-side bookkeeping of a rectangle of rows that began together: which are where, how long each is, which are done.

G  prefixes (groups)      K  slots of a group: its rollouts, and idle slots where it has fewer than another group
R  rows, G * K, group by group         n  rollouts of the batch         T  most new tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.random import token_uniforms

_COMPACTION_SHARE = 0.75
"""Finished rows leave when that shrinks the batch to this share: moving the cache costs about one decode step."""


class RolloutBatch:
    """The rows of some requests: which rollout is in which slot, how many tokens each has, which are done."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        counts = np.array([request.num_rollouts for request in requests])
        num_groups, num_slots = len(requests), int(counts.max())
        self.prefix_lengths = np.array([len(request.prefix) for request in requests])
        """int64 [G]."""
        first = np.cumsum(counts) - counts
        slots = np.arange(num_slots)[None].repeat(num_groups, axis=0)
        self._active = slots < counts[:, None]
        self._rollout_of = first[:, None] + np.minimum(slots, counts[:, None] - 1)
        """int64 [G, K]: an idle slot stands in for its group's last rollout."""
        self._limits = np.repeat([request.max_new_tokens for request in requests], counts)
        self._lengths = np.zeros(int(counts.sum()), dtype=np.int64)
        self._counts = counts

    @property
    def num_rollouts(self) -> int:
        """n."""
        return len(self._lengths)

    @property
    def max_new_tokens(self) -> int:
        """T."""
        return int(self._limits.max())

    @property
    def num_rows(self) -> int:
        """R."""
        return self._active.size

    @property
    def num_slots(self) -> int:
        """K."""
        return self._active.shape[1]

    @property
    def finished(self) -> bool:
        return not self._active.any()

    @property
    def rollout_of_rows(self) -> NDArray[np.int64]:
        """int64 [R]: in 0..n-1, for idle rows too."""
        return self._rollout_of.ravel()

    @property
    def column_of_rows(self) -> NDArray[np.int64]:
        """int64 [R]: the rollout that a row is writing, n for idle rows."""
        return np.where(self._active, self._rollout_of, self.num_rollouts).ravel()

    def advance(self, ended: NDArray[np.bool_] | None) -> None:
        """Each row has generated a token; ``ended``, bool [R]: whether it was the one that ends a rollout."""
        rows = np.flatnonzero(self._active)
        rollouts = self._rollout_of[self._active]
        self._lengths[rollouts] += 1
        done = self._lengths[rollouts] >= self._limits[rollouts]
        if ended is not None:
            done |= ended[rows]
        self._active.ravel()[rows[done]] = False

    def compact(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Drops finished rows if it saves enough: (groups kept [G'], slots kept of each [G', K']), or None."""
        per_group = self._active.sum(axis=1)
        groups = np.flatnonzero(per_group)
        num_slots = int(per_group.max(initial=0))
        if not 0 < len(groups) * num_slots <= _COMPACTION_SHARE * self.num_rows:
            return None
        slots = np.argsort(~self._active[groups], axis=1, kind="stable")[:, :num_slots]
        self._active = np.take_along_axis(self._active[groups], slots, axis=1)
        self._rollout_of = np.take_along_axis(self._rollout_of[groups], slots, axis=1)
        self.prefix_lengths = self.prefix_lengths[groups]
        return groups, slots

    def by_request(self, table: NDArray[np.generic]) -> list[list[NDArray[np.generic]]]:
        """The columns of ``table`` [T, n], each as long as its rollout, request by request."""
        columns = [table[:length, column].copy() for column, length in enumerate(self._lengths)]
        ends = np.cumsum(self._counts)
        return [columns[end - count : end] for end, count in zip(ends, self._counts, strict=True)]


def batch_uniforms(requests: Sequence[GenerationRequest], num_tokens: int) -> NDArray[np.float64]:
    """The uniform of every rollout of ``requests`` and every token position, [n, T]."""
    keys = [
        (request.seed_key.seed, request.seed_key.step, request.sample_id, rollout)
        for request in requests
        for rollout in range(request.num_rollouts)
    ]
    seeds, steps, samples, rollouts = np.array(keys, dtype=np.int64).T
    return token_uniforms(seeds, steps, samples, rollouts, num_tokens)
