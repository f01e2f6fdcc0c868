"""Options of the teacher: who judges, how often, and who rewrites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.quality import RECIPES, QualityRecipe
from megatron_sip.teacher.schedule import SCHEDULES


@dataclass(frozen=True)
class TeacherConfig:
    """The judges, their weights, and the process they live in."""

    teacher: str = option(
        "embedded",
        help="embedded: n-gram quality judge, word-list safety judge, word-overlap factuality judge, rewriter of rules",
        choices=("embedded",),
    )
    judge_model: str = option("", help="n-gram model of the embedded quality judge (tools/fit_judge.py)", metavar="NPZ")
    judge_quality_weight: float = option(1.0, help="weight of quality in a candidate's score; 0: not asked")
    judge_safety_weight: float = option(0.0, help="weight of safety; 0: not asked")
    judge_factuality_weight: float = option(0.0, help="weight of factuality; 0: not asked")
    quality_judge: str = option(
        "robust",
        help="embedded quality judge: plain log-probability (a policy cheats it within 20 steps), half, or robust",
        choices=tuple(RECIPES),
    )
    quality_settings: Mapping[str, float] = option(
        default_factory=dict,
        help="changes to it: unigram_discount, token_cap, repetition, cache, copying, shortness, overuse",
        metavar="NAME=X",
    )
    safety_words: str = option("", help="word list of the safety judge and the rewriter, one a line [a built-in list]")
    pair_schedule: str = option(
        "all", help="pairs of candidates to compare: all n(n-1)/2, pivot (n-1), circular (n)", choices=SCHEDULES
    )
    pair_pivot: str = option(
        "suffix", help="the candidate that pivot compares with", choices=("suffix", "rewrite", "rollout")
    )
    pair_order: str = option(
        "random",
        help="order in which a pair is shown: random, both (disagreement counts half), or fixed",
        choices=("random", "both", "fixed"),
    )
    judge_votes: int = option(1, help="votes per question")
    rewriter: str = option(
        "rule", help="rule: plain tidying rules; copy: the suffix as it is", choices=("rule", "copy")
    )
    judge_ledger: str = option("", help="SQLite file that keeps all verdicts and answers repeated questions [none]")
    judge_timeout_s: float = option(600.0, help="seconds to wait for the verdicts of a batch before the run stops")
    judge_queue: int = option(64, help="batches that the teacher process holds at most; more wait before they are sent")

    @property
    def weights(self) -> dict[str, float]:
        return {
            "quality": self.judge_quality_weight,
            "safety": self.judge_safety_weight,
            "factuality": self.judge_factuality_weight,
        }

    @property
    def quality_recipe(self) -> QualityRecipe:
        return RECIPES[self.quality_judge].with_settings(self.quality_settings)

    def validate(self) -> None:
        """Raises ConfigurationError for values that cannot work; files are opened by the process, not here."""
        for criterion, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigurationError(f"judge-{criterion}-weight is {weight}: give a number of at least 0")
        if not any(self.weights.values()):
            raise ConfigurationError("all judge weights are 0: give quality, safety or factuality a weight")
        if self.judge_votes < 1:
            raise ConfigurationError(f"judge-votes is {self.judge_votes}: give at least 1")
        if not self.judge_timeout_s > 0:
            raise ConfigurationError(f"judge-timeout-s is {self.judge_timeout_s}: give a number of seconds above 0")
        if self.judge_queue < 1:
            raise ConfigurationError(f"judge-queue is {self.judge_queue}: give at least 1")
        if self.quality_judge not in RECIPES:
            raise ConfigurationError(f"quality-judge is {self.quality_judge!r}: use one of {', '.join(RECIPES)}")
        RECIPES[self.quality_judge].with_settings(self.quality_settings)
