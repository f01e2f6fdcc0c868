"""Judgment -> Preference: which candidate is chosen, which rejected, or why the group teaches nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sip.preference.config import PreferenceConfig
from megatron_sip.types import CandidateGroup, CandidateKind, IntArray, Judgment, Preference

_ROUNDING = 1e-9
"""Scores are means of votes: equal ones may differ by rounding, unequal ones by far more than this."""


def select(
    groups: Sequence[CandidateGroup], judgments: Sequence[Judgment] | None, config: PreferenceConfig
) -> list[Preference]:
    """One preference per group, in order. ``judgments`` is None for a fixed order, which asks no judge."""
    if not config.needs_judge:
        return [_by_order(group, config.fixed_order) for group in groups]
    if judgments is None:
        raise ValueError(f"preference rule {config.preference_rule!r} needs judgments")
    return [_by_score(group, judgment, config) for group, judgment in zip(groups, judgments, strict=True)]


def _nothing(group: CandidateGroup, judgment: Judgment | None, reason: str) -> Preference:
    return Preference(group, judgment, chosen=None, rejected=None, weight=0.0, reason=reason)


def _by_order(group: CandidateGroup, order: Sequence[CandidateKind]) -> Preference:
    """The first candidate of each kind. A kind that the group lacks, such as a failed rewrite, is missing."""
    first: dict[CandidateKind, int] = {}
    for index, candidate in enumerate(group.candidates):
        if len(candidate.tokens):
            first.setdefault(candidate.kind, index)
    if any(kind not in first for kind in order):
        return _nothing(group, None, "missing")
    chosen = first[order[0]]
    rejected = first[order[1]] if len(order) == 2 else None
    if rejected is not None and _same_tokens(group, chosen, rejected):
        return _nothing(group, None, "identical")
    return Preference(group, None, chosen, rejected, weight=1.0)


def _by_score(group: CandidateGroup, judgment: Judgment, config: PreferenceConfig) -> Preference:
    """Highest against lowest of the candidates that have a score; fewer than two scores compare nothing."""
    scores = np.asarray(judgment.scores, dtype=np.float64)
    if scores.shape != (len(group.candidates),):
        raise ValueError(f"{len(group.candidates)} candidates but scores of shape {scores.shape}")
    usable = [i for i, c in enumerate(group.candidates) if np.isfinite(scores[i]) and len(c.tokens)]
    if len(usable) < 2:
        return _nothing(group, judgment, "missing")
    high, low = scores[usable].max(), scores[usable].min()
    chosen = _one_of([i for i in usable if scores[i] >= high - _ROUNDING], group, config, draw=0)
    rejected = _one_of([i for i in usable if scores[i] <= low + _ROUNDING], group, config, draw=1)
    if all(_same_tokens(group, usable[0], i) for i in usable[1:]):
        return _nothing(group, judgment, "identical")
    if high - low <= config.preference_min_gap + _ROUNDING:
        return _nothing(group, judgment, "tie")
    if config.preference_rule == "best":
        return Preference(group, judgment, chosen, None, weight=1.0)
    if _same_tokens(group, chosen, rejected):
        return _nothing(group, judgment, "identical")
    return Preference(group, judgment, chosen, rejected, weight=1.0)


def _one_of(tied: list[int], group: CandidateGroup, config: PreferenceConfig, draw: int) -> int:
    """Candidates stand in the order suffix, rewrite, rollouts: always taking the first would favour the suffix."""
    if len(tied) == 1 or config.preference_tie_break == "first":
        return tied[0]
    if config.preference_tie_break == "last":
        return tied[-1]
    # Keyed by the sample alone, so that the choice depends neither on the batch nor on the layout.
    generator = np.random.Generator(np.random.Philox(key=[group.sample.sample_id, draw]))
    return tied[int(generator.integers(len(tied)))]


def _same_tokens(group: CandidateGroup, one: int, other: int) -> bool:
    first: IntArray = group.candidates[one].tokens
    return np.array_equal(first, group.candidates[other].tokens)
