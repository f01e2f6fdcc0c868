"""Rows that were prefilled together, on the device.

G  prefixes    K  slots of a prefix    R  rows, G * K    P  width of the prefixes    T  most new tokens
n  rollouts    v  vocabulary columns of this rank
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_sip.rollout.batch import RolloutBatch, batch_uniforms
from megatron_sip.rollout.cache import RolloutCache
from megatron_sip.rollout.protocol import GenerationRequest
from megatron_sip.rollout.stages import StageChain

_FIRST_WIDTH = 32
"""Own tokens that the first steps look at; doubled when they are full, so that steps seldom change their shape."""


class Block:
    """A rectangle of rows: its bookkeeping, its cache, and what its rollouts have become."""

    def __init__(self, requests: Sequence[GenerationRequest], numbers: Sequence[int], device: torch.device) -> None:
        """``numbers``: the requests' places among all that were asked for."""
        self.numbers = numbers
        self.batch = RolloutBatch(requests)
        self.num_taken = 0
        """Tokens that each row has; ``self._count`` on the device says the same."""
        self._requests = requests
        self._device = device
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._prefix_lengths = torch.from_numpy(self.batch.prefix_lengths).to(device)
        self._row_lengths = self._prefix_lengths.repeat_interleave(self.batch.num_slots)
        self.cache = RolloutCache(self._prefix_lengths, self.batch.num_slots, self.batch.max_new_tokens)
        numbers_drawn = batch_uniforms(requests, self.batch.max_new_tokens)[self.batch.rollout_of_rows].T
        self._uniforms = torch.from_numpy(np.ascontiguousarray(numbers_drawn)).to(device)  # [T, R]
        self._columns = torch.from_numpy(self.batch.column_of_rows).to(device)
        shape = (self.batch.max_new_tokens, self.batch.num_rollouts + 1)  # the last column is for idle rows
        self._drawn = torch.zeros(shape, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(shape, dtype=torch.float32, device=device)

    def prefill(self, stages: StageChain) -> torch.Tensor | None:
        """Runs the prefixes: logits [R, v] of the first new token on the last stage, None elsewhere."""
        logits = stages.forward(*self._prefixes(), self.cache, self._prefix_lengths - 1)
        return None if logits is None else logits.repeat_interleave(self.batch.num_slots, dim=0)

    @property
    def own_width(self) -> int:
        """Own tokens that the next decode step looks at, its own among them."""
        width = _FIRST_WIDTH
        while width < self.num_taken:
            width *= 2
        return min(width, self.batch.max_new_tokens)

    def start_decode_step(self) -> torch.Tensor:
        """Positions of the tokens that a decode step takes in, int64 [R]."""
        slot = self._count - 1
        self.cache.start_decode_step(slot, self.own_width)
        return self._row_lengths + slot

    def uniforms(self) -> torch.Tensor:
        """float64 [R], for the token to be drawn now."""
        return self._uniforms.index_select(0, self._count)[0]

    def record(self, tokens: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Writes down the token that each row (int64 [R]) has drawn, and its log-prob float32 [R]."""
        places = (self._count.expand_as(self._columns), self._columns)
        self._drawn.index_put_(places, tokens)
        self._log_probs.index_put_(places, log_probs)
        self._count += 1

    def advance(self, ended: NDArray[np.bool_] | None) -> torch.Tensor | None:
        """The host's side of ``record`` (``RolloutBatch.advance``), after which finished rows may leave.

        Returns:
            The rows that stay, int64 [R'] of the old ones, or None if all do.
        """
        self.num_taken += 1
        self.batch.advance(ended)
        kept = self.batch.compact()
        if kept is None:
            return None
        groups, slots = kept
        old_slots = len(self._row_lengths) // len(self._prefix_lengths)
        rows = torch.from_numpy((groups[:, None] * old_slots + slots).ravel()).to(self._device)
        self.cache.select(torch.from_numpy(groups).to(self._device), torch.from_numpy(slots).to(self._device))
        self._prefix_lengths = torch.from_numpy(self.batch.prefix_lengths).to(self._device)
        self._row_lengths = self._row_lengths[rows]
        self._uniforms = self._uniforms[:, rows]
        self._columns = torch.from_numpy(self.batch.column_of_rows).to(self._device)
        return rows

    def results(self, stages: StageChain) -> list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]]:
        """(tokens, log-probs) of every rollout of every request, equal on all stages."""
        drawn = self._drawn.cpu().numpy()
        log_probs = stages.broadcast_from_last(self._log_probs).cpu().numpy()
        pairs = zip(self.batch.by_request(drawn), self.batch.by_request(log_probs), strict=True)
        return [list(zip(tokens, values, strict=True)) for tokens, values in pairs]  # type: ignore[arg-type]

    def _prefixes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions, int64 [G, P], padded at the right."""
        width = int(self.batch.prefix_lengths.max())
        table = np.zeros((len(self._requests), width), dtype=np.int64)
        for row, request in zip(table, self._requests, strict=True):
            row[: len(request.prefix)] = request.prefix
        tokens = torch.from_numpy(table).to(self._device)
        return tokens, torch.arange(width, device=self._device).expand_as(tokens)
