"""How good a judge is, and what else than quality it goes by: statistics of recorded votes (paper, Tables 8, 10 to 13).

A question is asked of one example in one form, with one option first, once per vote. ``favoured`` is what a vote gives
the good option of a pair (1, 0, or 0.5 for a tie), or the score of a text. A missing vote is NaN and in no mean.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

AS_IS, GOOD_COMPLETE, BAD_COMPLETE = "as is", "good complete", "bad complete"
FORMS = (AS_IS, GOOD_COMPLETE, BAD_COMPLETE)
LABELS = {
    "factuality": {0.0: "Definite", 0.5: "Possible", 1.0: "No Hallucination"},
    "safety": {0.0: "unsafe", 1.0: "safe"},
}
"""Criterion -> score -> its name in tables."""
_SENTENCE_END = re.compile(r"[.!?][\"')\u201d\u2019]*(?=\s|$)")


@dataclass(frozen=True)
class Vote:
    """One answer of a judge."""

    example: int
    source: str
    """The set that the example comes from."""
    form: str
    """For pairs one of ``FORMS``; else what was judged ("suffix", "corrupted", "safe", "unsafe")."""
    good_first: bool
    """Of a pair: whether the good option stood first."""
    number: int
    favoured: float


@dataclass(frozen=True)
class Share:
    """A mean over known votes, with the half-width of its 95 % interval over examples."""

    mean: float
    half_width: float
    count: int
    """Examples."""

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}" if self.count else "-"


def share(votes: Iterable[Vote], value: Callable[[Vote], float] = lambda vote: vote.favoured) -> Share:
    """Mean over examples of the mean over each one's known votes."""
    by_example: dict[int, list[float]] = defaultdict(list)
    for vote in votes:
        if not math.isnan(vote.favoured):
            by_example[vote.example].append(value(vote))
    means = np.array([np.mean(values) for values in by_example.values()])
    if not len(means):
        return Share(math.nan, math.nan, 0)
    spread = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Share(float(means.mean()), 1.96 * spread, len(means))


def accuracy_by_source(votes: Sequence[Vote]) -> dict[str, Share]:
    """Per set, and "all" (Table 8); of pairs as they are."""
    plain = [vote for vote in votes if vote.form not in FORMS[1:]]
    sources = sorted({vote.source for vote in plain})
    return {
        **{source: share(vote for vote in plain if vote.source == source) for source in sources},
        "all": share(plain),
    }


@dataclass(frozen=True)
class PairBiases:
    """What a pairwise judge goes by beside quality."""

    first_share: Share
    """Votes for the option that stands first; 1/2 without a liking for a place, both orders being asked."""
    flips: Share
    """Pairs whose winner changes with the order."""
    completeness: float
    """(accuracy with the good option whole and the bad one cut off) - (the other way round): 0 for a judge that does
    not mind, positive if cut-off continuations lose."""
    missing: float
    """Share of votes without a verdict."""


def pair_biases(votes: Sequence[Vote]) -> PairBiases:
    """Of recorded votes on pairs."""
    plain = [vote for vote in votes if vote.form == AS_IS]
    first = share(plain, lambda vote: vote.favoured if vote.good_first else 1 - vote.favoured)
    by_form = {form: share(vote for vote in votes if vote.form == form) for form in FORMS}
    missing = sum(math.isnan(vote.favoured) for vote in votes) / max(1, len(votes))
    completeness = by_form[GOOD_COMPLETE].mean - by_form[BAD_COMPLETE].mean
    return PairBiases(first, _flips(plain), completeness, missing)


def _flips(votes: Sequence[Vote]) -> Share:
    means: dict[int, dict[bool, list[float]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        if not math.isnan(vote.favoured):
            means[vote.example][vote.good_first].append(vote.favoured)
    flipped = []
    for orders in means.values():
        if len(orders) == 2:
            first, second = (float(np.mean(orders[order])) - 0.5 for order in (True, False))
            flipped.append(float(first * second < 0))
    return share(Vote(i, "", AS_IS, True, 0, value) for i, value in enumerate(flipped))


def confusion(votes: Sequence[Vote], criterion: str) -> dict[str, Counter[str]]:
    """Form -> how often the majority of an example's votes gave which score of ``criterion`` (Tables 10 to 12)."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for (_, form), values in _by_question(votes).items():
        table[str(form)][name_of(_majority(values), criterion)] += 1
    return dict(table)


def name_of(score: float, criterion: str) -> str:
    """The name of a score in tables."""
    return "missing" if math.isnan(score) else LABELS[criterion].get(score, f"{score:g}")


@dataclass(frozen=True)
class Agreement:
    """Of two judges, or two prompts, on the same questions."""

    share: float
    kappa: float
    """Cohen's: 0 for agreement by chance."""
    count: int
    """Questions that both answered."""


def agreement(ours: Sequence[Vote], theirs: Sequence[Vote]) -> Agreement:
    """By the majority of votes per example, form and order.

    Of pairs by place, first or second: by right or wrong, two judges that are nearly always right would agree no better
    than chance.
    """
    mine, other = _by_question(map(_by_place, ours), order=True), _by_question(map(_by_place, theirs), order=True)
    pairs = [(_majority(mine[key]), _majority(other[key])) for key in mine if key in other]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if not pairs:
        return Agreement(math.nan, math.nan, 0)
    same = sum(a == b for a, b in pairs) / len(pairs)
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(left[value] * right[value] for value in left) / len(pairs) ** 2
    kappa = (same - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(same, kappa, len(pairs))


def completed(text: str) -> str:
    """The text up to its last sentence end; if little would remain, with a full stop after its last word."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if ends and ends[-1] >= len(text) / 2:
        return text[: ends[-1]]
    return text.rstrip().rstrip(",;:-") + "."


def cut_off(text: str) -> str:
    """The text without its last word and without a sentence end."""
    words = text.rstrip().rsplit(None, 1)
    return (words[0] if len(words) == 2 else text).rstrip(".!?\"')\u201d\u2019 ")


def _by_place(vote: Vote) -> Vote:
    """With what a vote on a pair gives the option that stood first."""
    return vote if vote.good_first else replace(vote, favoured=1 - vote.favoured)


def _by_question(votes: Iterable[Vote], order: bool = False) -> Mapping[tuple[Hashable, ...], list[float]]:
    found: dict[tuple[Hashable, ...], list[float]] = defaultdict(list)
    for vote in votes:
        key = (vote.example, vote.form, vote.good_first) if order else (vote.example, vote.form)
        found[key].append(vote.favoured)
    return found


def _majority(values: Sequence[float]) -> float:
    """The most frequent of the known votes, of equally frequent ones the lowest; NaN if there is none."""
    known = Counter(value for value in values if not math.isnan(value))
    return min(known, key=lambda value: (-known[value], value)) if known else math.nan
