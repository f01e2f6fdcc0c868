"""Draws tokens from logits that are split over tensor-parallel ranks, without gathering the vocabulary.

Inverse CDF with one uniform per token: the ranks exchange the sums of their shares, all pick the same owner, and the
owner finds the token in its share. Token ids are in the order of the vocabulary at any number of ranks, so a uniform
picks the same token, up to rounding.

    R  rows             v  vocabulary columns of this rank, padding included
    W  valid columns of this rank, padding excluded
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sip.rollout.parameters import SamplingParameters

_BLOCK = 64
"""Columns per block of the two-level search: a running sum over all columns is slow everywhere."""
_FIRST_NUCLEUS = 64
"""Most likely tokens per rank that are exchanged first when a nucleus is looked for."""


class VocabParallelSampler:
    """Samples under tensor parallelism; every rank of the group calls it with equal rows and gets equal tokens."""

    def __init__(self, vocab_size: int, tp_group: ProcessGroup | None, tp_rank: int, tp_size: int) -> None:
        """``vocab_size``: without the padding that tensor parallelism adds; ``tp_group`` may be None at tp_size 1."""
        self._vocab_size = vocab_size
        self._group = tp_group
        self._rank = tp_rank
        self._size = tp_size

    def sample(
        self, logits: torch.Tensor, uniforms: torch.Tensor, parameters: SamplingParameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [R, v] of this rank, uniforms float64 [R] in [0, 1) -> tokens int64 [R], log-probs float32 [R].

        The log-prob is the sampled token's under the untruncated softmax at T = 1, whatever the parameters.
        """
        start = self._rank * logits.shape[1]
        valid = min(max(self._vocab_size - start, 0), logits.shape[1])
        share = _Share.of(logits, start, valid)
        if parameters.greedy:
            return self._greedy(share)
        return self._inverse_cdf(share, uniforms, parameters)

    def _greedy(self, share: _Share) -> tuple[torch.Tensor, torch.Tensor]:
        mass = share.weights(1.0, None).sum(dim=1, dtype=torch.float64)
        best = share.argmax() + share.start
        maxima, masses, tokens = self._gather(torch.stack([share.maximum.double(), mass, best.double()])).unbind(1)
        top, owner = maxima.max(dim=0)  # the first rank wins a tie, as the first column does within a rank
        total = (masses * (maxima - top).exp()).sum(dim=0)
        return tokens.gather(0, owner[None])[0].long(), -total.log().float()

    def _inverse_cdf(
        self, share: _Share, uniforms: torch.Tensor, parameters: SamplingParameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        temperature = parameters.temperature
        floor = self._top_k_floor(share, parameters.top_k) if parameters.top_k else None
        if parameters.top_p < 1.0:
            floor = self._nucleus_floor(share, floor, parameters)
        search = _BlockSearch(share.weights(temperature, floor))
        plain = search.total if temperature == 1.0 and floor is None else share.weights(1.0, None).sum(1).double()

        stats = self._gather(torch.stack([share.maximum.double(), plain, search.total]))
        maxima, plain_masses, masses = stats.unbind(1)
        top = maxima.max(dim=0).values
        normalizer = top + (plain_masses * (maxima - top).exp()).sum(dim=0).log()

        scales = ((maxima - top) / temperature).exp()
        ends = (masses * scales).cumsum(dim=0)
        target = _below(uniforms * ends[-1], ends[-1])
        owner = (ends <= target).sum(dim=0)
        residual = (target - ends[owner - 1, torch.arange(len(owner), device=ends.device)].where(owner > 0, 0.0)) / (
            scales[self._rank]
        )

        column = search.find(residual)
        mine = owner == self._rank
        found = torch.stack([(column + share.start).double(), share.at(column).double()])
        tokens, chosen = self._sum(found.where(mine, 0.0)).unbind(0)
        return tokens.long(), (chosen - normalizer).float()

    def _top_k_floor(self, share: _Share, top_k: int) -> torch.Tensor:
        """The value of the k-th largest logit over all ranks, float32 [R]."""
        candidates = self._merge(share.largest(top_k))
        return candidates.topk(min(top_k, self._vocab_size), dim=1).values[:, -1]

    def _nucleus_floor(self, share: _Share, floor: torch.Tensor | None, parameters: SamplingParameters) -> torch.Tensor:
        """The smallest logit within the nucleus, float32 [R]: exact, from as few exchanged logits as it takes."""
        temperature = parameters.temperature
        mass = share.weights(temperature, floor).sum(dim=1, dtype=torch.float64)
        maxima, masses = self._gather(torch.stack([share.maximum.double(), mass])).unbind(1)
        top = maxima.max(dim=0).values
        goal = parameters.top_p * (masses * ((maxima - top) / temperature).exp()).sum(dim=0)

        num_local = _FIRST_NUCLEUS
        while True:
            local = share.largest(num_local)
            candidates = self._merge(local).sort(dim=1, descending=True).values
            reached = ((candidates.double() - top[:, None]) / temperature).exp().cumsum(dim=1)
            inside = (reached < goal[:, None]).sum(dim=1).clamp(max=candidates.shape[1] - 1)
            edge = candidates.gather(1, inside[:, None])[:, 0]
            # A rank that sent only its largest may hold more between its last one sent and ours.
            unsent = self._gather(local[:, -1].double()[None])[:, 0].max(dim=0).values
            certain = (reached[:, -1] >= goal) & (edge >= unsent)
            if num_local >= share.width or bool(certain.all()):
                return edge if floor is None else torch.maximum(edge, floor)
            num_local *= 8

    def _merge(self, local: torch.Tensor) -> torch.Tensor:
        """[R, n] of each rank -> [R, tp * n]."""
        if self._size == 1:
            return local
        return self._gather(local.t().contiguous()).flatten(0, 1).t()

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n, R] of each rank -> [tp, n, R]."""
        if self._size == 1:
            return values[None]
        gathered = values.new_empty((self._size * values.shape[0], *values.shape[1:]))
        dist.all_gather_into_tensor(gathered, values, group=self._group)
        return gathered.view(self._size, *values.shape)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self._size > 1:
            dist.all_reduce(values, group=self._group)
        return values


@dataclass(frozen=True)
class _Share:
    """This rank's part of the logits: ``logits`` [R, W], ``maximum`` float32 [R]; W is 0 where all is padding."""

    logits: torch.Tensor
    maximum: torch.Tensor
    start: int
    width: int
    """v, equal on all ranks."""

    @classmethod
    def of(cls, logits: torch.Tensor, start: int, valid: int) -> _Share:
        width = logits.shape[1]
        logits = logits[:, :valid].float()
        maximum = logits.amax(dim=1) if valid else logits.new_full((len(logits),), -torch.inf)
        return cls(logits, maximum, start, width)

    def weights(self, temperature: float, floor: torch.Tensor | None) -> torch.Tensor:
        """exp((logit - maximum) / T), 0 below the floor: float32 [R, W]."""
        weights = self.logits - self.maximum[:, None]
        if temperature != 1.0:
            weights /= temperature
        weights.exp_()
        return weights if floor is None else weights.masked_fill_(self.logits < floor[:, None], 0.0)

    def argmax(self) -> torch.Tensor:
        if self.logits.shape[1]:
            return self.logits.argmax(dim=1)
        return torch.zeros(len(self.logits), dtype=torch.int64, device=self.logits.device)

    def largest(self, count: int) -> torch.Tensor:
        """The largest logits in falling order, [R, min(count, v)]: -inf where there are fewer."""
        count = min(count, self.width)
        values = self.logits.topk(min(count, self.logits.shape[1]), dim=1).values
        return torch.nn.functional.pad(values, (0, count - values.shape[1]), value=-torch.inf)

    def at(self, column: torch.Tensor) -> torch.Tensor:
        if self.logits.shape[1]:
            return self.logits.gather(1, column[:, None])[:, 0]
        return torch.zeros_like(self.maximum)


class _BlockSearch:
    """Finds where a running sum of weights passes a target: block sums first, then inside one block."""

    def __init__(self, weights: torch.Tensor) -> None:
        """weights: float32 [R, W], at least 0."""
        rows, columns = weights.shape
        self._num_columns = columns
        padding = -columns % _BLOCK if columns else _BLOCK
        if padding:
            weights = torch.nn.functional.pad(weights, (0, padding))
        self._blocks = weights.view(rows, -1, _BLOCK)
        self._ends = self._blocks.sum(dim=2).double().cumsum(dim=1)

    @property
    def total(self) -> torch.Tensor:
        """float64 [R]."""
        return self._ends[:, -1]

    def find(self, target: torch.Tensor) -> torch.Tensor:
        """The first column whose running sum exceeds ``target`` (float64 [R]), int64 [R]: one of positive weight.

        For a target out of range, as rows of another owner have, some column.
        """
        block = _first_above(self._ends, target)
        before = self._ends.gather(1, (block - 1).clamp_(min=0)[:, None])[:, 0].where(block > 0, 0.0)
        inner = self._blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0].double().cumsum(dim=1)
        column = block * _BLOCK + _first_above(inner, target - before)
        return column.clamp_(max=max(self._num_columns - 1, 0))


def _first_above(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first running sum [R, n] that exceeds the target [R], which is pulled below the last sum."""
    return torch.searchsorted(ends, _below(target, ends[:, -1])[:, None], right=True)[:, 0].clamp_(
        max=ends.shape[1] - 1
    )


def _below(target: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Rounding may lift a target to the end of the range; the next number below belongs to the last positive weight."""
    return torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
