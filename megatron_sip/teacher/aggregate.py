"""Votes -> score, criteria -> weighted total. Missing stays missing: NaN, never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_sip.teacher.interfaces import FloatArray


def mean_of_votes(votes: Sequence[float]) -> float:
    """Mean of the votes that are there; NaN if none is."""
    given = [vote for vote in votes if np.isfinite(vote)]
    return float(np.mean(given)) if given else float("nan")


def weighted_total(criteria: Mapping[str, FloatArray], weights: Mapping[str, float], num_candidates: int) -> FloatArray:
    """Sum of weight x score per candidate, float64 [C]; NaN where a criterion that has a weight is missing."""
    total = np.zeros(num_candidates)
    for criterion, weight in weights.items():
        if weight != 0:
            total = total + weight * np.asarray(criteria[criterion], dtype=np.float64)
    return total
