"""Options of the way from judged groups to what is trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.types import CandidateKind

_KINDS = tuple(kind.value for kind in CandidateKind)

PREFIX_BUCKET = 64
"""Prefix blocks of training rows are multiples of this many tokens (``preference.rows``)."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Which candidate is chosen, which is rejected, and when a group teaches nothing."""

    preference_rule: str = option(
        "best_vs_worst",
        help="best_vs_worst: highest against lowest score (online DPO); best: highest score alone (RF-NLL); or a fixed "
        "order without a judge, such as 'rewrite>rollout', or one kind alone, such as 'rollout' (SFT)",
    )
    preference_min_gap: float = option(
        0.0, help="a group is a tie, and teaches nothing, unless best minus worst score is larger than this"
    )
    preference_tie_break: str = option(
        "random",
        help="among candidates that share the best (or the worst) score: the first, the last, or one drawn by a "
        "number that depends on the sample alone",
        choices=("random", "first", "last"),
    )

    @property
    def fixed_order(self) -> tuple[CandidateKind, ...]:
        """The kinds of a fixed order, one or two; empty if a judge decides."""
        if self.preference_rule in ("best_vs_worst", "best"):
            return ()
        return tuple(CandidateKind(kind.strip()) for kind in self.preference_rule.split(">"))

    @property
    def needs_judge(self) -> bool:
        return not self.fixed_order

    @property
    def num_candidates(self) -> int:
        """Candidates in a training row: 2 for a pair, 1 for one that is learned alone."""
        return 2 if self.preference_rule == "best_vs_worst" or len(self.fixed_order) == 2 else 1

    def validate(self) -> None:
        """Raises ConfigurationError for a rule or a gap that cannot work."""
        if self.preference_rule not in ("best_vs_worst", "best"):
            kinds = [kind.strip() for kind in self.preference_rule.split(">")]
            if len(kinds) > 2 or any(kind not in _KINDS for kind in kinds):
                raise ConfigurationError(
                    f"preference-rule is {self.preference_rule!r}: use best_vs_worst, best, or one or two of "
                    f"{', '.join(_KINDS)} joined by '>'"
                )
            if len(kinds) == 2 and kinds[0] == kinds[1]:
                raise ConfigurationError(
                    f"preference-rule {self.preference_rule!r} prefers a kind to itself: name two kinds, or one alone"
                )
        if not (math.isfinite(self.preference_min_gap) and self.preference_min_gap >= 0):
            raise ConfigurationError(f"preference-min-gap is {self.preference_min_gap}: give a number of at least 0")
