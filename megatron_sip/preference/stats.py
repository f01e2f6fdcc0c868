"""What was chosen and what the judge gave, as sums that add up over data-parallel replicas.

``preference_sums`` returns the same names on every replica, whatever it has seen; ``preference_metrics`` turns their
global sums into the scalars of the log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_sip.types import CandidateKind, Preference

REASONS = ("tie", "missing", "identical")
CRITERIA = ("quality", "safety", "factuality")
_KINDS = tuple(kind.value for kind in CandidateKind)


def preference_sums(preferences: Sequence[Preference]) -> dict[str, float]:
    """Counts and sums over one replica's preferences; add them over replicas (and steps) name by name."""
    sums = dict.fromkeys(_names(), 0.0)
    for preference in preferences:
        sums["groups"] += 1
        if preference.weight == 0:
            sums[f"skipped/{preference.reason}"] += 1
        candidates = preference.group.candidates
        if preference.weight != 0 and preference.chosen is not None:
            sums["chosen"] += 1
            sums[f"chosen/{candidates[preference.chosen].kind.value}"] += 1
        if preference.weight != 0 and preference.rejected is not None:
            sums["rejected"] += 1
            sums[f"rejected/{candidates[preference.rejected].kind.value}"] += 1
        if preference.judgment is not None:
            _add_scores(sums, preference)
    return sums


def preference_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Global sums -> scalars; one of which nothing was counted is left out rather than reported as 0."""
    metrics = {"sip/pairs_skipped": sum(sums[f"skipped/{reason}"] for reason in REASONS)}
    for reason in REASONS:
        metrics[f"sip/pairs_skipped/{reason}"] = sums[f"skipped/{reason}"]
    for role in ("chosen", "rejected"):
        if sums[role]:
            for kind in _KINDS:
                metrics[f"sip/{role}_rate/{kind}"] = sums[f"{role}/{kind}"] / sums[role]
    for kind in _KINDS:
        if sums[f"score/{kind}/count"]:
            metrics[f"sip/score/{kind}"] = sums[f"score/{kind}/sum"] / sums[f"score/{kind}/count"]
    for criterion in CRITERIA:
        count = sums[f"reward/{criterion}/count"]
        if count:
            mean = sums[f"reward/{criterion}/sum"] / count
            # A variance of exactly 0 may come out of this difference as a small negative number.
            variance = max(0.0, sums[f"reward/{criterion}/squares"] / count - mean**2)
            metrics[f"sip/reward/{criterion}_mean"] = mean
            metrics[f"sip/reward/{criterion}_std"] = math.sqrt(variance)
    return metrics


def _names() -> list[str]:
    names = ["groups", "chosen", "rejected", *(f"skipped/{reason}" for reason in REASONS)]
    for kind in _KINDS:
        names += [f"chosen/{kind}", f"rejected/{kind}", f"score/{kind}/sum", f"score/{kind}/count"]
    for criterion in CRITERIA:
        names += [f"reward/{criterion}/{moment}" for moment in ("count", "sum", "squares")]
    return names


def _add_scores(sums: dict[str, float], preference: Preference) -> None:
    """Scores that are missing (NaN) are not counted."""
    judgment = preference.judgment
    assert judgment is not None
    for candidate, score in zip(preference.group.candidates, judgment.scores, strict=True):
        if np.isfinite(score):
            sums[f"score/{candidate.kind.value}/sum"] += float(score)
            sums[f"score/{candidate.kind.value}/count"] += 1
    for criterion in CRITERIA:
        given = np.asarray(judgment.criteria.get(criterion, ()), dtype=np.float64)
        given = given[np.isfinite(given)]
        sums[f"reward/{criterion}/count"] += given.size
        sums[f"reward/{criterion}/sum"] += float(given.sum())
        sums[f"reward/{criterion}/squares"] += float((given**2).sum())
