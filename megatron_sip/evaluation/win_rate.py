"""Win rates of paired comparisons, with intervals over the prefixes.

Legend: n prefixes, s seeds. An outcome is 1 for a win, 1/2 for a tie, 0 for a loss, NaN without a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from megatron_sip.observability.text_statistics import Tokens, ngrams
from megatron_sip.types import FloatArray

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class WinRate:
    """How often one policy's continuation beats the other's."""

    rate: float
    """Mean outcome over prefixes, each the mean over its seeds; ties count 1/2. NaN without any verdict."""
    low: float
    high: float
    """Ends of the bootstrap interval over prefixes."""
    wins: int
    ties: int
    losses: int
    missing: int
    """Pairs without a verdict, which count nowhere else."""
    num_prefixes: int
    """Prefixes with at least one verdict."""
    confidence: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def outcomes(policy_scores: FloatArray, baseline_scores: FloatArray) -> FloatArray:
    """Outcomes from scores of any shape: the higher score wins, equal ones tie, NaN on either side is no verdict."""
    result = np.where(policy_scores > baseline_scores, 1.0, np.where(policy_scores < baseline_scores, 0.0, 0.5))
    result[np.isnan(policy_scores) | np.isnan(baseline_scores)] = np.nan
    return result


def win_rate(pair_outcomes: FloatArray, confidence: float = 0.95, seed: int = 0) -> WinRate:
    """Summary of outcomes [n, s] or [n].

    Prefixes are resampled and not pairs, since continuations of one prefix are not independent.
    """
    table = np.asarray(pair_outcomes, dtype=np.float64)
    table = table.reshape(len(table), -1)
    judged = ~np.isnan(table)
    kept = judged.any(axis=1)
    sums = np.where(judged, table, 0.0).sum(axis=1)[kept]
    means = sums / judged.sum(axis=1)[kept]
    low, high = bootstrap_interval(means, confidence, seed)
    return WinRate(
        rate=float(means.mean()) if len(means) else math.nan,
        low=low,
        high=high,
        wins=int((table == 1.0).sum()),
        ties=int((table == 0.5).sum()),
        losses=int((table == 0.0).sum()),
        missing=int((~judged).sum()),
        num_prefixes=int(kept.sum()),
        confidence=confidence,
    )


def bootstrap_interval(means: FloatArray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prefixes [n]; Wilson's where all are equal and resampling sees no
    spread (100 of 100 wins do not prove a rate of exactly 1)."""
    if len(means) == 0:
        return math.nan, math.nan
    if np.all(means == means[0]):
        return wilson_interval(float(means.sum()), len(means), confidence)
    generator = np.random.Generator(np.random.Philox(key=seed))
    picks = generator.integers(0, len(means), size=(_NUM_RESAMPLES, len(means)))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means[picks].mean(axis=1), [tail, 100.0 - tail])
    return float(low), float(high)


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927)."""
    if trials == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1.0 - share) / trials + z * z / (4 * trials * trials))
    scale = 1.0 + z * z / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def coherence_outcomes(policy: Sequence[Tokens], baseline: Sequence[Tokens], n: int = 2) -> FloatArray:
    """Outcomes [n] of the question which of two continuations repeats itself less, and only that (paper, figure 13),
    answered by counting: the smaller share of repeated n-grams wins. Continuations without any n-gram repeat nothing.
    """
    return outcomes(
        -np.array([_repeated_share(tokens, n) for tokens in policy]),
        -np.array([_repeated_share(tokens, n) for tokens in baseline]),
    )


def _repeated_share(tokens: Tokens, n: int) -> float:
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
