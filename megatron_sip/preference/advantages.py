"""Rewards of a group's rollouts -> advantages for GRPO.

G  groups    K  rollouts of a group
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sip.types import CandidateGroup, FloatArray, IntArray

_SPREAD = 1e-9
"""Rewards closer together than this are equal but for rounding of their mean over votes."""
_NO_TOKENS: IntArray = np.zeros(0, dtype=np.int64)
_NO_LOG_PROBS: FloatArray = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class GroupAdvantages:
    """What the rollouts of one prompt teach, relative to each other."""

    values: FloatArray
    """float64 [K]; 0 where the reward is missing or the group teaches nothing."""
    weight: float
    """0 for a group that teaches nothing, else 1."""
    reason: str = ""
    """"" or "no_spread", "missing": why the weight is 0."""


def group_advantages(rewards: FloatArray, normalize: bool = True) -> GroupAdvantages:
    """Rewards [K] minus their mean, with ``normalize`` divided by their standard deviation.

    With: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2; the deviation is the population's). Without: Dr.GRPO
    (Liu et al. 2025, arXiv 2503.20783). A missing reward (NaN) is in neither mean nor deviation. A group whose rewards
    are all equal, or with less than two of them, teaches nothing.
    """
    known = np.isfinite(rewards)
    values = np.zeros(len(rewards), dtype=np.float64)
    if known.sum() < 2:
        return GroupAdvantages(values, 0.0, "missing")
    given = rewards[known].astype(np.float64)
    if given.max() - given.min() <= _SPREAD:
        return GroupAdvantages(values, 0.0, "no_spread")
    values[known] = (given - given.mean()) / (given.std() if normalize else 1.0)
    return GroupAdvantages(values, 1.0)


def without_missing(group: CandidateGroup, rewards: FloatArray) -> CandidateGroup:
    """The group with the tokens of rollouts without a reward taken out: they keep their place, and are not learned."""
    return replace(
        group,
        candidates=tuple(
            candidate
            if np.isfinite(reward)
            else replace(candidate, tokens=_NO_TOKENS, sampling_log_probs=_NO_LOG_PROBS)
            for candidate, reward in zip(group.candidates, rewards, strict=True)
        ),
    )


def reward_sums(rewards: Sequence[FloatArray], advantages: Sequence[GroupAdvantages]) -> dict[str, float]:
    """Counts and sums of one replica, equal names everywhere: add them over replicas, then ``reward_metrics``."""
    sums = dict.fromkeys(
        ("rewards", "reward", "missing", "spread", "groups", "skipped/no_spread", "skipped/missing"), 0.0
    )
    for group, advantage in zip(rewards, advantages, strict=True):
        known = group[np.isfinite(group)]
        sums["groups"] += 1
        sums["rewards"] += len(known)
        sums["missing"] += len(group) - len(known)
        sums["reward"] += float(known.sum())
        sums["spread"] += float(known.std()) if len(known) else 0.0
        if advantage.reason:
            sums[f"skipped/{advantage.reason}"] += 1
    return sums


def reward_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Scalars of the log: mean reward, mean spread within a group, groups skipped and why, rewards missing."""
    scalars = {
        "grpo/skipped_no_spread": sums["skipped/no_spread"],
        "grpo/skipped_missing": sums["skipped/missing"],
        "grpo/rewards_missing": sums["missing"],
    }
    if sums["rewards"]:
        scalars["reward/mean"] = sums["reward"] / sums["rewards"]
        scalars["reward/group_std"] = sums["spread"] / sums["groups"]
    return scalars
