"""Which pairs of candidates to compare, in rounds, and the quality score that follows.

A schedule is asked for a round of pairs, told their outcomes, and asked again until a round is empty: fixed schedules
have one round, adaptive ones choose the next from what they were told. All pairs of a round may be asked in parallel.

Every schedule works on a batch of P groups of n candidates each, so that ``tools/simulate_pairs.py`` plays tens of
thousands of groups with the code that a run uses; the panel asks for one group at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.interfaces import FloatArray, IntArray
from megatron_sip.teacher.schedule_search import BestWorst, default_budget

SCHEDULES = ("all", "pivot", "circular", "best_worst")


def follows_offsets(schedule: str) -> bool:
    """Whether a schedule's pairs depend on what else is known of the candidates, or are fixed from the start."""
    return schedule == "best_worst"


@dataclass(frozen=True)
class Comparison:
    """The outcome of one pair: the mean of its votes."""

    first: int
    second: int
    win: float
    """Share of votes for ``first``, 0..1; NaN if every vote is missing."""
    votes: int = 1
    """How many votes that is the mean of."""


class PairSchedule(Protocol):
    """What the panel follows for one group."""

    def next_round(self) -> list[tuple[int, int]]:
        """Pairs to compare now; empty when done."""
        ...

    def record(self, comparisons: Sequence[Comparison]) -> None:
        """Outcomes of the round, in any order."""
        ...

    def scores(self) -> FloatArray:
        """Quality per candidate in 0..1, float64 [n]; NaN for one without a valid comparison."""
        ...


class BatchSchedule(Protocol):
    """The same for P groups at once."""

    def next_round(self) -> IntArray:
        """Pairs to compare now, int64 [P, m, 2]; m = 0 when done. A pair of one candidate with itself is filler."""
        ...

    def record(self, wins: FloatArray, votes: FloatArray) -> None:
        """Share of votes for the first of each pair and how many votes that was, both [P, m]; NaN: missing."""
        ...

    def scores(self) -> FloatArray:
        """Quality per candidate in 0..1, float64 [P, n]; NaN for one without a valid comparison."""
        ...


class FixedPairs:
    """The same pairs for every group, in one round; the score is the mean of a candidate's valid comparisons."""

    def __init__(self, num_groups: int, num_candidates: int, pairs: Sequence[tuple[int, int]]) -> None:
        self._pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._open = len(pairs) > 0
        self._wins = np.zeros((num_groups, num_candidates))
        self._counts = np.zeros((num_groups, num_candidates))

    def next_round(self) -> IntArray:
        pairs = self._pairs if self._open else self._pairs[:0]
        self._open = False
        return np.broadcast_to(pairs, (len(self._wins), *pairs.shape))

    def record(self, wins: FloatArray, votes: FloatArray) -> None:
        valid = np.isfinite(wins)
        for index, (first, second) in enumerate(self._pairs):
            there, win = valid[:, index], wins[:, index]
            self._wins[there, first] += win[there]
            self._wins[there, second] += 1 - win[there]
            self._counts[there, first] += 1
            self._counts[there, second] += 1

    def scores(self) -> FloatArray:
        scores = np.full(self._wins.shape, np.nan)
        return np.divide(self._wins, self._counts, out=scores, where=self._counts > 0)


class Pivot(FixedPairs):
    """Each candidate with the pivot: n - 1 comparisons. A score is the chance to beat the pivot, whose own is 1/2."""

    def __init__(self, num_groups: int, num_candidates: int, pivot: int) -> None:
        super().__init__(num_groups, num_candidates, [(i, pivot) for i in range(num_candidates) if i != pivot])
        self._pivot = pivot

    def scores(self) -> FloatArray:
        scores = super().scores()
        column = scores[:, self._pivot]
        column[np.isfinite(column)] = 0.5
        return scores


class OneGroup:
    """A batch of one as a ``PairSchedule``."""

    def __init__(self, batch: BatchSchedule) -> None:
        self._batch = batch
        self._asked: list[tuple[int, int]] = []

    def next_round(self) -> list[tuple[int, int]]:
        while (asked := self._batch.next_round()[0]).size:
            self._asked = [(int(i), int(j)) for i, j in asked]
            if pairs := [(i, j) for i, j in self._asked if i != j]:
                return pairs
            self.record([])
        return []

    def record(self, comparisons: Sequence[Comparison]) -> None:
        by_pair = {(c.first, c.second): c for c in comparisons}
        filler = Comparison(0, 0, win=float("nan"))
        ordered = [by_pair.get((i, j), filler) for i, j in self._asked]
        wins, votes = [c.win for c in ordered], [float(c.votes) for c in ordered]
        self._batch.record(np.array([wins]), np.array([votes]))

    def scores(self) -> FloatArray:
        return self._batch.scores()[0]


def make_schedule(
    name: str, kinds: Sequence[str], pivot_kind: str, offsets: FloatArray, budget: int = 0
) -> PairSchedule:
    """A new schedule for one group.

    ``offsets``: float64 [n], what the other criteria add to each candidate's weighted total, over the quality weight.
    Fixed schedules do not need it; the search for both ends of the total does. ``budget``: comparisons that the search
    may ask, 0 for its default. Raises ConfigurationError for a pivot that the group lacks.
    """
    return OneGroup(make_batch(name, kinds, pivot_kind, np.asarray(offsets)[None], budget))


def make_batch(name: str, kinds: Sequence[str], pivot_kind: str, offsets: FloatArray, budget: int = 0) -> BatchSchedule:
    """The same for P groups of candidates of the same kinds; ``offsets``: float64 [P, n]."""
    groups, size = offsets.shape
    if len(kinds) != size:
        raise ValueError(f"{len(kinds)} candidates but {size} offsets")
    if name == "all":
        return FixedPairs(groups, size, list(itertools.combinations(range(size), 2)))
    if name == "circular":
        circle = [(i, i + 1) for i in range(size - 1)] + ([(size - 1, 0)] if size > 2 else [])
        return FixedPairs(groups, size, circle)
    if name == "best_worst":
        return BestWorst(offsets, budget)
    if name == "pivot":
        if pivot_kind not in kinds:
            raise ConfigurationError(
                f"pair-schedule pivot compares with the {pivot_kind}, but a group has only {', '.join(kinds)}: add "
                f"{pivot_kind} to candidates or choose another pair-pivot"
            )
        return Pivot(groups, size, list(kinds).index(pivot_kind))
    raise ConfigurationError(f"pair-schedule is {name!r}: use one of {', '.join(SCHEDULES)}")


def num_comparisons(name: str, num_candidates: int, budget: int = 0) -> int:
    """How many comparisons a group of that size is asked, at most."""
    if name == "best_worst":
        return 0 if num_candidates < 2 else budget or default_budget(num_candidates)
    kinds = ("suffix",) * num_candidates
    return make_batch(name, kinds, "suffix", np.zeros((1, num_candidates))).next_round().shape[1]
