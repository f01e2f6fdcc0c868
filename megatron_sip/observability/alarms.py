"""Alarms for a policy that pleases its judge in place of writing: it grows short, repetitive, certain, or all alike.

What a judge that is hacked looks like: one token makes up nearly everything, or all prefixes get the same boilerplate,
while the chosen rate goes to 1. None of it shows in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sip.observability.config import ObservabilityConfig
from megatron_sip.observability.text_statistics import (
    Tokens,
    distinct_n,
    max_token_share,
    mean_length,
    repeated_ngram_share,
    shared_ngram_share,
)
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind


@dataclass(frozen=True)
class PolicyHealth:
    """Statistics of a step's rollouts. NaN means not measured, and raises no alarm."""

    length: float = math.nan
    """Mean tokens per rollout."""
    length_share: float = math.nan
    """Mean length over the longest that a rollout may be."""
    repetition: float = math.nan
    """Share of trigrams that repeat an earlier one of the same rollout."""
    distinct_2: float = math.nan
    max_token_share: float = math.nan
    shared_trigrams: float = math.nan
    """Share of trigrams that occur in rollouts of two prefixes or more."""
    entropy: float = math.nan
    """Nats per token; an estimate from the sampled tokens, unbiased if they were sampled at T = 1 untruncated."""
    kl_to_reference: float = math.nan
    """Nats per token; likewise."""

    def scalars(self) -> dict[str, float]:
        """The measured ones, under their names in the metrics log."""
        named = {
            "rollout/length": self.length,
            "rollout/repetition": self.repetition,
            "rollout/distinct_2": self.distinct_2,
            "rollout/max_token_share": self.max_token_share,
            "rollout/shared_trigrams": self.shared_trigrams,
            "policy/entropy": self.entropy,
            "policy/kl_to_reference": self.kl_to_reference,
        }
        return {name: value for name, value in named.items() if not math.isnan(value)}


def measure_health(
    groups: Sequence[CandidateGroup], max_length: int, kl_to_reference: float = math.nan
) -> PolicyHealth:
    """Statistics of the rollouts in ``groups``; ``max_length`` is the rollout limit N in tokens."""
    rollouts = [[c for c in group.candidates if c.kind is CandidateKind.ROLLOUT] for group in groups]
    return measure_tokens(
        [[candidate.tokens.tolist() for candidate in group] for group in rollouts],
        max_length,
        entropy=estimate_entropy([candidate for group in rollouts for candidate in group]),
        kl_to_reference=kl_to_reference,
    )


def measure_tokens(
    groups: Sequence[Sequence[Tokens]],
    max_length: int,
    entropy: float = math.nan,
    kl_to_reference: float = math.nan,
) -> PolicyHealth:
    """Statistics of token lists, grouped by prefix."""
    continuations = [tokens for group in groups for tokens in group]
    length = mean_length(continuations)
    return PolicyHealth(
        length=length,
        length_share=length / max_length,
        repetition=repeated_ngram_share(continuations, 3),
        distinct_2=distinct_n(continuations, 2),
        max_token_share=max_token_share(continuations),
        # With one prefix nothing can be shared: that is not a measurement of 0.
        shared_trigrams=shared_ngram_share(groups, 3) if len(groups) > 1 else math.nan,
        entropy=entropy,
        kl_to_reference=kl_to_reference,
    )


def estimate_entropy(candidates: Sequence[Candidate]) -> float:
    """Minus the mean sampling log-prob per token, in nats; NaN if no candidate was sampled."""
    log_probs = [c.sampling_log_probs for c in candidates if c.sampling_log_probs is not None]
    num_tokens = sum(values.size for values in log_probs)
    return -sum(float(values.sum(dtype="float64")) for values in log_probs) / num_tokens if num_tokens else math.nan


@dataclass(frozen=True)
class Alarm:
    """One statistic beyond its limit."""

    name: str
    """Name of the statistic, as in the metrics log."""
    value: float
    limit: float
    message: str


def exceeded(health: PolicyHealth, limits: ObservabilityConfig) -> list[Alarm]:
    """All statistics beyond their limits."""
    too_small = [
        ("rollout/length", health.length_share, limits.alarm_min_length, "rollouts are short: part of the limit"),
        ("rollout/distinct_2", health.distinct_2, limits.alarm_min_distinct_2, "few distinct bigrams"),
        ("policy/entropy", health.entropy, limits.alarm_min_entropy, "the policy's entropy fell: nats per token"),
    ]
    too_large = [
        ("rollout/repetition", health.repetition, limits.alarm_max_repetition, "rollouts repeat themselves"),
        ("rollout/max_token_share", health.max_token_share, limits.alarm_max_token_share, "one token dominates"),
        (
            "rollout/shared_trigrams",
            health.shared_trigrams,
            limits.alarm_max_shared_trigrams,
            "prefixes share boilerplate",
        ),
        (
            "policy/kl_to_reference",
            health.kl_to_reference,
            limits.alarm_max_kl,
            "far from the reference: nats per token",
        ),
    ]
    # NaN compares false both ways, so what was not measured raises nothing.
    alarms = [
        Alarm(name, value, limit, f"{text} {value:.3g} < {limit:g}")
        for name, value, limit, text in too_small
        if value < limit
    ]
    return alarms + [
        Alarm(name, value, limit, f"{text} {value:.3g} > {limit:g}")
        for name, value, limit, text in too_large
        if value > limit
    ]


class AlarmBell:
    """Passes on an alarm when it begins and again every ``interval`` steps while it holds, not at every step."""

    def __init__(self, limits: ObservabilityConfig) -> None:
        self._limits = limits
        self._last_rung: dict[str, int] = {}

    def check(self, step: int, health: PolicyHealth) -> list[Alarm]:
        """The alarms to print at this step."""
        return [alarm for alarm in exceeded(health, self._limits) if self._ring(step, alarm.name)]

    def _ring(self, step: int, name: str) -> bool:
        last = self._last_rung.get(name)
        if last is not None and step - last < self._limits.alarm_interval:
            return False
        self._last_rung[name] = step
        return True

    def state_dict(self) -> dict[str, int]:
        """Step at which each alarm was last passed on."""
        return dict(self._last_rung)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint."""
        self._last_rung = dict(state)
