"""The embedded quality judge: an n-gram model's opinion, made hard to cheat.

A plain log-probability judge is beaten within a few steps by one frequent token repeated. What each term is against:

    value of a token   log p(token | 3 before it) - unigram_discount x log p(token)   against frequent tokens
                       no more than token_cap                                          against chains of certain tokens
                       no less than -token_floor                                       in favour of rare words
                       p mixed with the prefix's own token frequencies (cache)         in favour of staying on topic
    minus repetition   r + 2 r^2, r the share of bigrams and trigrams that stood in the candidate before: mild where
                       real text repeats itself, more than any gain for a loop
    minus copying      share of 4-grams that stand in the prefix
    minus shortness    missing share of the original suffix's length
    minus overuse      trigrams that turn up in the rollouts of far more prompts than in real text (running statistics)

It knows nothing of meaning: it prefers locally plausible text, no more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.interfaces import (
    FloatArray,
    IntArray,
    JudgeGroup,
    JudgeIdentity,
    Question,
    Verdict,
    passages_hash,
)
from megatron_sip.teacher.ngram import NgramModel
from megatron_sip.teacher.overuse import History, OveruseStatistics

_COPY_LENGTH = 4


@dataclass(frozen=True)
class QualityRecipe:
    """Strength of each term, in nats per token; 0 switches it off."""

    unigram_discount: float
    repetition: float
    token_cap: float = float("inf")
    token_floor: float = float("inf")
    cache: float = 0.0
    """Share of the prefix's token frequencies in p, 0..1."""
    copying: float = 0.0
    shortness: float = 0.0
    overuse: float = 0.0

    def with_settings(self, settings: Mapping[str, float]) -> QualityRecipe:
        """A copy with some strengths changed. Raises ConfigurationError for an unknown name or a bad value."""
        names = [field.name for field in dataclasses.fields(self)]
        for name, value in settings.items():
            if name not in names:
                raise ConfigurationError(f"quality-settings has no {name!r}: there are {', '.join(names)}")
            if not value >= 0 or (name == "cache" and value >= 1):
                limit = "at least 0 and below 1" if name == "cache" else "at least 0"
                raise ConfigurationError(f"quality-settings {name} is {value}: give a number {limit}")
        return dataclasses.replace(self, **settings)

    def fingerprint(self) -> str:
        """Names the recipe in the ledger."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


RECIPES: Mapping[str, QualityRecipe] = {
    "plain": QualityRecipe(unigram_discount=0.0, repetition=0.0),
    "half": QualityRecipe(unigram_discount=0.5, repetition=3.0, shortness=3.0),
    "robust": QualityRecipe(
        unigram_discount=0.5,
        repetition=3.0,
        token_cap=1.5,
        token_floor=4.0,
        cache=0.1,
        copying=2.0,
        shortness=3.0,
        overuse=1.0,
    ),
}
"""``plain`` is there to show what goes wrong with it."""


class NgramQualityJudge:
    """Pairwise; a comparison goes to the higher score, an equal one is a tie. Draws nothing: votes agree."""

    criterion = "quality"

    def __init__(self, model: NgramModel, recipe: QualityRecipe) -> None:
        self._model = model
        self._recipe = recipe
        self._overuse = OveruseStatistics(model) if recipe.overuse else None
        self._name = f"ngram-{model.order}"
        self._model_id = model.fingerprint() + recipe.fingerprint()

    def identity(self) -> JudgeIdentity:
        return ngram_identity(self._name, self._model_id, self._overuse.history if self._overuse else None)

    def prompt_hash(self, question: Question) -> str:
        return ngram_prompt_hash(question)

    async def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        start = time.perf_counter()
        known = {id(question.group): self.scores(question.group) for question in _one_per_group(questions)}
        latency = (time.perf_counter() - start) / max(1, len(questions))
        verdicts = []
        for question in questions:
            group = question.group
            first, second = (float(known[id(group)][option]) for option in question.options)
            raw = f"{first:.4f} vs {second:.4f}"
            if np.isnan(first) or np.isnan(second):
                verdicts.append(Verdict(float("nan"), raw, "empty candidate", latency))
            else:
                verdicts.append(Verdict(0.5 if first == second else float(first > second), raw, latency_s=latency))
        return verdicts

    def scores(self, group: JudgeGroup) -> FloatArray:
        """Nats per token, float64 [C]; NaN for a candidate without tokens."""
        recipe, prefix = self._recipe, np.asarray(group.prefix.tokens, dtype=np.int64)
        candidates = [np.asarray(c.tokens, dtype=np.int64) for c in group.candidates]
        log_probs, log_unigrams = self._model.log_probs(prefix, candidates)
        if recipe.cache and len(prefix):
            frequency = np.bincount(prefix, minlength=self._model.vocab_size) / len(prefix)
            flat = np.concatenate(candidates)
            log_probs = np.log((1 - recipe.cache) * np.exp(log_probs) + recipe.cache * frequency[flat])
        values = np.clip(log_probs - recipe.unigram_discount * log_unigrams, -recipe.token_floor, recipe.token_cap)
        source = gram_set(prefix) if recipe.copying else frozenset()
        ends = np.cumsum([len(c) for c in candidates])
        scores = np.full(len(candidates), np.nan)
        for index, candidate in enumerate(candidates):
            if len(candidate):
                mean = values[ends[index] - len(candidate) : ends[index]].mean()
                scores[index] = mean - self._penalty(source, candidate, len(group.reference.tokens))
        return scores

    def _penalty(self, source: frozenset[bytes], candidate: IntArray, reference_length: int) -> float:
        recipe = self._recipe
        repeated = repetition(candidate)
        penalty = recipe.repetition * (repeated + 2 * repeated**2)
        if recipe.copying:
            penalty += recipe.copying * copied_share(candidate, source)
        if recipe.shortness and reference_length:
            penalty += recipe.shortness * max(0.0, 1 - len(candidate) / reference_length)
        if self._overuse:
            penalty += recipe.overuse * self._overuse.penalty(candidate)
        return penalty

    def observe(self, groups: Sequence[JudgeGroup]) -> None:
        if self._overuse:
            self._overuse.observe(groups)

    def state_dict(self) -> dict[str, Any]:
        return self._overuse.state_dict() if self._overuse else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._overuse and state:
            self._overuse.load_state_dict(state)


def ngram_identity(name: str, model: str, history: History | None) -> JudgeIdentity:
    """``model``: fingerprints of model and recipe. The state of running statistics is part of who judges."""
    return JudgeIdentity(name, model + (f"@{history.digest[:16]}" if history is not None else ""), sampling="")


def ngram_prompt_hash(question: Question) -> str:
    """Of all that an n-gram judge looks at."""
    group = question.group
    return passages_hash([group.prefix, group.reference, *(group.candidates[i] for i in question.options)])


def _one_per_group(questions: Sequence[Question]) -> list[Question]:
    return list({id(question.group): question for question in questions}.values())


def repetition(tokens: IntArray) -> float:
    """Share of bigrams and of trigrams that stood before in the same text, the mean of the two, 0..1."""
    shares = []
    for length in (2, 3):
        grams = _grams(tokens, length)
        if len(grams):
            shares.append(1 - len(np.unique(grams, axis=0)) / len(grams))
    return float(np.mean(shares)) if shares else 0.0


def gram_set(tokens: IntArray) -> frozenset[bytes]:
    """The 4-grams of a text, as ``copied_share`` looks them up."""
    return frozenset(gram.tobytes() for gram in _grams(tokens, _COPY_LENGTH))


def copied_share(tokens: IntArray, source: frozenset[bytes]) -> float:
    """Share of the text's 4-grams that are in ``source``, 0..1."""
    grams = _grams(tokens, _COPY_LENGTH)
    return sum(gram.tobytes() in source for gram in grams) / len(grams) if len(grams) else 0.0


def _grams(tokens: IntArray, length: int) -> IntArray:
    """int64 [len(tokens) - length + 1, length]."""
    if len(tokens) < length:
        return np.zeros((0, length), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, dtype=np.int64), length)
