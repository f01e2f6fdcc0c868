"""Host-side bookkeeping of rows that are decoded together.

G  prefixes (groups)      K  slots of a group: its rollouts, and idle slots where it has fewer than another group
R  rows in the batch, G * K, group by group         n  rollouts of the batch         T  most new tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.random import token_uniforms

_COMPACTION_SHARE = 0.75
"""Finished rows leave when that shrinks the batch to this share: moving the cache costs about one decode step."""


def plan_batches(requests: Sequence[GenerationRequest], max_rows: int) -> list[list[int]]:
    """Cuts requests into batches of up to ``max_rows`` rows, a request at least: lists of indices into ``requests``.

    Requests of like prefix length stand together, longest first, for low padding; greedy and sampled ones apart.
    """
    order = sorted(
        range(len(requests)), key=lambda index: (_sampling_class(requests[index]), -len(requests[index].prefix), index)
    )
    batches: list[list[int]] = []
    for index in order:
        request = requests[index]
        current = batches[-1] if batches else []
        rows = (len(current) + 1) * max([request.num_rollouts, *(requests[other].num_rollouts for other in current)])
        alike = bool(current) and _sampling_class(requests[current[0]]) == _sampling_class(request)
        if alike and rows <= max_rows:
            current.append(index)
        else:
            batches.append([index])
    return batches


def _sampling_class(request: GenerationRequest) -> tuple[bool, tuple[float, float, int]]:
    sampling = request.sampling
    return request.greedy, (sampling.temperature, sampling.top_p, sampling.top_k) if sampling else (-1.0, 0.0, 0)


class RolloutBatch:
    """The rows of one batch: which rollout is in which slot, what each has generated, which are done."""

    def __init__(self, requests: Sequence[GenerationRequest], eod: int | None) -> None:
        """``eod``: the token that ends a rollout, None to go on to the limit."""
        self._eod = eod
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
        self._tokens = np.zeros((int(counts.sum()), self.max_new_tokens), dtype=np.int64)
        self._lengths = np.zeros(len(self._tokens), dtype=np.int64)
        self._counts = counts

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
    def active_rows(self) -> NDArray[np.int64]:
        """Rows that still generate, ascending."""
        return np.flatnonzero(self._active)

    @property
    def active_rollouts(self) -> NDArray[np.int64]:
        """The rollout, in 0..n-1, of each active row."""
        return self._rollout_of[self._active]

    @property
    def rollout_of_rows(self) -> NDArray[np.int64]:
        """int64 [R]: in 0..n-1, for idle rows too."""
        return self._rollout_of.ravel()

    def accept(self, tokens: NDArray[np.int64]) -> None:
        """Takes the token that each row (int64 [R]) has generated; those of finished and idle rows are dropped."""
        rows, rollouts = self.active_rows, self.active_rollouts
        generated = tokens[rows]
        self._tokens[rollouts, self._lengths[rollouts]] = generated
        self._lengths[rollouts] += 1
        done = self._lengths[rollouts] >= self._limits[rollouts]
        if self._eod is not None:
            done |= generated == self._eod
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

    def results(self) -> list[list[NDArray[np.int64]]]:
        """The tokens of each rollout of each request."""
        trimmed = [tokens[:length].copy() for tokens, length in zip(self._tokens, self._lengths, strict=True)]
        ends = np.cumsum(self._counts)
        return [trimmed[end - count : end] for end, count in zip(ends, self._counts, strict=True)]


def batch_uniforms(requests: Sequence[GenerationRequest], num_tokens: int) -> NDArray[np.float64]:
    """The uniform of every rollout of ``requests`` and every token position, [n, T]."""
    keys = [
        (request.seed_key.seed, request.seed_key.step, request.sample_id, rollout)
        for request in requests
        for rollout in range(request.num_rollouts)
    ]
    seeds, steps, samples, rollouts = np.array(keys, dtype=np.int64).T
    return token_uniforms(seeds, steps, samples, rollouts, num_tokens)
