"""Numbers that give away degenerate text: pure functions of token lists.

``continuations`` is a list of token lists. Pooled shares depend on how much text is pooled (more text, fewer distinct
bigrams): compare only between sets of about the same size.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Tokens = Sequence[int]


def ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    """All n-grams of one continuation in order; none if it is shorter than n."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def mean_length(continuations: Sequence[Tokens]) -> float:
    """Tokens per continuation; NaN without any."""
    return sum(len(tokens) for tokens in continuations) / len(continuations) if continuations else math.nan


def distinct_n(continuations: Sequence[Tokens], n: int = 2) -> float:
    """Distinct n-grams over all n-grams, pooled (Li et al. 2016); NaN without any n-gram."""
    counts = Counter(gram for tokens in continuations for gram in ngrams(tokens, n))
    return len(counts) / counts.total() if counts else math.nan


def max_token_share(continuations: Sequence[Tokens]) -> float:
    """Share of the most frequent token among all tokens, pooled; NaN without any token."""
    counts = Counter(token for tokens in continuations for token in tokens)
    return max(counts.values()) / counts.total() if counts else math.nan


def repeated_ngram_share(continuations: Sequence[Tokens], n: int = 3) -> float:
    """Share of the n-grams that repeat an earlier one of the same continuation, pooled; NaN without any n-gram."""
    total = repeated = 0
    for tokens in continuations:
        grams = ngrams(tokens, n)
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else math.nan


def shared_ngram_share(groups: Sequence[Sequence[Tokens]], n: int = 3, min_groups: int = 2) -> float:
    """Boilerplate: share of the n-grams that occur in continuations of ``min_groups`` or more prefixes.

    ``groups`` holds the continuations of one prefix each. An n-gram counts once per group, so that repetition within a
    prefix, which ``repeated_ngram_share`` measures, does not weigh in here. NaN without any n-gram.
    """
    groups_with: dict[tuple[int, ...], int] = defaultdict(int)
    for continuations in groups:
        for gram in {gram for tokens in continuations for gram in ngrams(tokens, n)}:
            groups_with[gram] += 1
    total = sum(groups_with.values())
    shared = sum(count for count in groups_with.values() if count >= min_groups)
    return shared / total if total else math.nan
