"""Which pairs of candidates to compare, in rounds, and the quality score that follows.

A schedule is asked for a round of pairs, told their outcomes, and asked again until a round is empty: fixed schedules
have one round, adaptive ones choose the next from what they were told. All pairs of a round may be asked in parallel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.interfaces import FloatArray

SCHEDULES = ("all", "pivot", "circular")


@dataclass(frozen=True)
class Comparison:
    """The outcome of one pair: the mean of its votes."""

    first: int
    second: int
    win: float
    """Share of votes for ``first``, 0..1; NaN if every vote is missing."""


class PairSchedule(Protocol):
    def next_round(self) -> list[tuple[int, int]]:
        """Pairs to compare now; empty when done."""
        ...

    def record(self, comparisons: Sequence[Comparison]) -> None:
        """Outcomes of the round, in any order."""
        ...

    def scores(self) -> FloatArray:
        """Quality per candidate in 0..1, float64 [n]; NaN for one without a valid comparison."""
        ...


class _OneRound:
    """A fixed list of pairs; the score is the mean of a candidate's valid comparisons."""

    def __init__(self, num_candidates: int, pairs: Sequence[tuple[int, int]]) -> None:
        self._pairs = list(pairs)
        self._wins = np.zeros(num_candidates)
        self._counts = np.zeros(num_candidates)

    def next_round(self) -> list[tuple[int, int]]:
        pairs, self._pairs = self._pairs, []
        return pairs

    def record(self, comparisons: Sequence[Comparison]) -> None:
        for comparison in comparisons:
            if np.isfinite(comparison.win):
                self._wins[comparison.first] += comparison.win
                self._wins[comparison.second] += 1 - comparison.win
                self._counts[[comparison.first, comparison.second]] += 1

    def scores(self) -> FloatArray:
        scores = np.full(self._wins.shape, np.nan)
        return np.divide(self._wins, self._counts, out=scores, where=self._counts > 0)


class AllPairs(_OneRound):
    """n(n - 1)/2 comparisons, as in the paper's main runs."""

    def __init__(self, num_candidates: int) -> None:
        super().__init__(num_candidates, list(itertools.combinations(range(num_candidates), 2)))


class Circular(_OneRound):
    """Each candidate with the next, the last with the first: n comparisons (one for n = 2)."""

    def __init__(self, num_candidates: int) -> None:
        pairs = [(i, i + 1) for i in range(num_candidates - 1)]
        if num_candidates > 2:
            pairs.append((num_candidates - 1, 0))
        super().__init__(num_candidates, pairs)


class Pivot(_OneRound):
    """Each candidate with the pivot: n - 1 comparisons. A score is the chance to beat the pivot, whose own is 1/2."""

    def __init__(self, num_candidates: int, pivot: int) -> None:
        super().__init__(num_candidates, [(i, pivot) for i in range(num_candidates) if i != pivot])
        self._pivot = pivot

    def scores(self) -> FloatArray:
        scores = super().scores()
        if np.isfinite(scores[self._pivot]):
            scores[self._pivot] = 0.5
        return scores


def make_schedule(name: str, kinds: Sequence[str], pivot_kind: str, offsets: FloatArray) -> PairSchedule:
    """A new schedule for one group.

    ``offsets``: float64 [n], what the other criteria add to each candidate's weighted total, over the quality weight.
    Fixed schedules do not need it; a search for both ends of the total does. Raises ConfigurationError for a pivot that
    the group lacks.
    """
    if len(kinds) != len(offsets):
        raise ValueError(f"{len(kinds)} candidates but {len(offsets)} offsets")
    if name == "all":
        return AllPairs(len(kinds))
    if name == "circular":
        return Circular(len(kinds))
    if name == "pivot":
        if pivot_kind not in kinds:
            raise ConfigurationError(
                f"pair-schedule pivot compares with the {pivot_kind}, but a group has only {', '.join(kinds)}: add "
                f"{pivot_kind} to candidates or choose another pair-pivot"
            )
        return Pivot(len(kinds), list(kinds).index(pivot_kind))
    raise ConfigurationError(f"pair-schedule is {name!r}: use one of {', '.join(SCHEDULES)}")
