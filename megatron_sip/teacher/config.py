"""Options of the teacher: who judges, how often, and who rewrites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sip.config.fields import option
from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.http.config import HttpOptions
from megatron_sip.teacher.quality import RECIPES, QualityRecipe
from megatron_sip.teacher.schedule import SCHEDULES


@dataclass(frozen=True)
class PanelOptions:
    """The judges, their weights, and the process they live in."""

    teacher: str = option(
        "embedded",
        help="embedded: n-gram judge, word-list safety judge, word-overlap factuality judge, rewriter of rules; "
        "http: models behind judge-endpoints; model: a checkpoint of tools/train_judge.py, in process on the CPU",
        choices=("embedded", "http", "model"),
    )
    judge_checkpoint: str = option("", help="what --save was of the judge of --teacher model", metavar="DIR")
    rewriter_checkpoint: str = option("", help="the same of the rewriter of --rewriter model", metavar="DIR")
    judge_tokenizer_type: str = option("", help="type of the tokenizer of these models [the run's]")
    judge_tokenizer_model: str = option("", help="tokenizer of these models [the run's]")
    judge_prompt_length: int = option(3584, help="tokens of a prompt of these models; longer prefixes are cut")
    judge_model: str = option("", help="n-gram model of the embedded quality judge (tools/fit_judge.py)", metavar="NPZ")
    judge_quality_weight: float = option(1.0, help="weight of quality in a candidate's score; 0: not asked")
    judge_safety_weight: float = option(0.0, help="weight of safety; 0: not asked")
    judge_factuality_weight: float = option(0.0, help="weight of factuality; 0: not asked")
    judge_coherence_weight: float = option(0.0, help="weight of coherence (least repetition), by http; 0: not asked")
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
    safety_words: str = option(
        "", help="word list of the safety judge and the rewriter, one a line [a built-in list]", metavar="FILE"
    )
    pair_schedule: str = option(
        "all",
        help="pairs of candidates to compare: all n(n-1)/2, pivot (n-1), circular (n), or best_worst: a search for "
        "both ends of the weighted total in at most 8 rounds",
        choices=SCHEDULES,
    )
    pair_budget: int = option(
        0, help="comparisons per prompt of best_worst, repeats included; 0: 12/5 per candidate, at most all pairs"
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
        "auto",
        help="rule: plain tidying rules; copy: the suffix as it is; http: a model behind an endpoint; model: a "
        "checkpoint; auto: a checkpoint if there is one, else http as the teacher, or rule",
        choices=("auto", "rule", "copy", "http", "model"),
    )
    judge_ledger: str = option(
        "", help="SQLite files DIR/NAME.rREPLICA.NUMBER.sqlite, on a local disk, that keep all verdicts and answer "
        "repeated questions [none]", metavar="DIR/NAME.sqlite",
    )  # fmt: skip
    ledger_raw: str = option(
        "all", help="whose words are kept with the scores, which always are: all samples', a share's, or none",
        choices=("all", "sample", "none"),
    )  # fmt: skip
    ledger_sample: float = option(0.01, help="that share, for --ledger-raw sample; what failed is kept besides")
    ledger_rotate_mib: float = option(256.0, help="size from which on a replica's ledger goes on in a new file, in MiB")
    replay_judgments: str = option(
        "", help="ledger of a run to repeat: verdicts and rewrites come from it and nobody is asked; --judge-ledger is "
        "then not written [ask]", metavar="DIR/NAME.sqlite",
    )  # fmt: skip
    judge_timeout_s: float = option(600.0, help="seconds to wait for the verdicts of a batch before training pauses")
    judge_queue: int = option(64, help="batches that the teacher process holds at most; more wait before they are sent")


@dataclass(frozen=True)
class TeacherConfig(HttpOptions, PanelOptions):
    """The judges, their weights, and the process they live in."""

    @property
    def weights(self) -> dict[str, float]:
        """Criterion -> weight in the total."""
        weights = {
            "quality": self.judge_quality_weight,
            "safety": self.judge_safety_weight,
            "factuality": self.judge_factuality_weight,
        }
        return weights | ({"coherence": self.judge_coherence_weight} if self.judge_coherence_weight else {})

    @property
    def criteria(self) -> tuple[str, ...]:
        """Those that are asked."""
        return tuple(criterion for criterion, weight in self.weights.items() if weight)

    @property
    def rewriter_kind(self) -> str:
        """``rule``, ``copy``, ``http`` or ``model``."""
        if self.rewriter != "auto":
            return self.rewriter
        if self.rewriter_checkpoint:
            return "model"
        return "http" if self.teacher == "http" else "rule"

    def uses_models(self, judging: bool = True, rewriting: bool = True) -> bool:
        """Whether the teacher's process holds models of ours."""
        return (judging and self.teacher == "model") or (rewriting and self.rewriter_kind == "model")

    def missing_models(self, judging: bool = True, rewriting: bool = True) -> list[str]:
        """What these models lack, one line each."""
        missing = []
        if judging and self.teacher == "model" and not self.judge_checkpoint:
            missing.append("--judge-checkpoint: none; give what --save was of tools/train_judge.py")
        if rewriting and self.rewriter_kind == "model" and not self.rewriter_checkpoint:
            missing.append("--rewriter-checkpoint: none; give what --save was of tools/train_rewriter.py")
        return missing

    @property
    def quality_recipe(self) -> QualityRecipe:
        return RECIPES[self.quality_judge].with_settings(self.quality_settings)

    def votes_of(self, criterion: str) -> int:
        """Votes per question of a criterion."""
        if self.teacher == "embedded":
            return self.judge_votes
        return self.role_settings(criterion, self.judge_votes).votes

    def http_roles(self, judging: bool = True, rewriting: bool = True) -> dict[str, int]:
        """Roles that are asked over HTTP, with their votes per question."""
        roles = {}
        if judging and self.teacher == "http":
            roles = {criterion: self.judge_votes for criterion in self.criteria}
        if rewriting and self.rewriter_kind == "http":
            roles["rewriter"] = 1
        return roles

    def validate(self) -> None:
        """Raises ConfigurationError for values that cannot work; files are opened by the process, not here."""
        for criterion, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigurationError(f"judge-{criterion}-weight is {weight}: give a number of at least 0")
        if not any(self.weights.values()):
            raise ConfigurationError("all judge weights are 0: give quality, safety or factuality a weight")
        if self.judge_coherence_weight and self.teacher != "http":
            raise ConfigurationError(
                f"judge-coherence-weight is {self.judge_coherence_weight}, but the {self.teacher} teacher has none "
                "of it: give --teacher http, or weight 0"
            )
        if self.judge_factuality_weight and self.teacher == "model":
            raise ConfigurationError(
                f"judge-factuality-weight is {self.judge_factuality_weight}, but --teacher model judges quality and "
                "safety alone: give weight 0, or --teacher http"
            )
        if self.judge_prompt_length < 1:
            raise ConfigurationError(f"judge-prompt-length is {self.judge_prompt_length}: give at least 1 token")
        if self.pair_budget < 0:
            raise ConfigurationError(
                f"pair-budget is {self.pair_budget}: give a number of comparisons, 0 for the default"
            )
        if self.judge_votes < 1:
            raise ConfigurationError(f"judge-votes is {self.judge_votes}: give at least 1")
        if not self.judge_timeout_s > 0:
            raise ConfigurationError(f"judge-timeout-s is {self.judge_timeout_s}: give a number of seconds above 0")
        if not 0 <= self.ledger_sample <= 1:
            raise ConfigurationError(f"ledger-sample is {self.ledger_sample}: give a share from 0 to 1")
        if not self.ledger_rotate_mib >= 1:
            raise ConfigurationError(f"ledger-rotate-mib is {self.ledger_rotate_mib}: give at least 1")
        if self.judge_queue < 1:
            raise ConfigurationError(f"judge-queue is {self.judge_queue}: give at least 1")
        if self.quality_judge not in RECIPES:
            raise ConfigurationError(f"quality-judge is {self.quality_judge!r}: use one of {', '.join(RECIPES)}")
        RECIPES[self.quality_judge].with_settings(self.quality_settings)
        self.validate_http(self.http_roles(), self.judge_timeout_s)
