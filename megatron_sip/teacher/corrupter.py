"""Makes bad continuations out of good ones, by rules: the other half of a judge's training pairs, offline.

They break language, order and facts. What a strong model can do (plausible falsehoods) they cannot: see
``http.corrupter``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.interfaces import RewriteItem

_PARTS = re.compile(r"\s+|\S+")
_FACT = re.compile(r"[A-Z][a-z]+|\d+")


@dataclass(frozen=True)
class Corruption:
    """A bad version of a suffix."""

    text: str | None
    """None if there is none; ``failure`` then says why."""
    kind: str
    """How it was made."""
    failure: str = ""


class Corrupter(Protocol):
    async def corrupt(self, items: Sequence[RewriteItem]) -> Sequence[Corruption]:
        """One per item, in order; prefix and suffix as for a rewriter."""
        ...


class RuleCorrupter:
    """Draws a kind per item. Words that come in are taken from the suffix of the item before (the last, for the first).

    A corruption depends on the seed, the item and that neighbour alone.
    """

    def __init__(self, kinds: Sequence[str] = ("replace", "shuffle", "swap", "repeat", "facts"), share: float = 0.4,
                 seed: int = 0) -> None:  # fmt: skip
        """``share``: of the words, for those kinds that change some. Raises ConfigurationError."""
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ConfigurationError(f"corruption kinds {', '.join(kinds)!r}: give one or more of {', '.join(KINDS)}")
        if not 0 < share <= 1:
            raise ConfigurationError(f"corruption share is {share}: give a number above 0, at most 1")
        self._kinds = tuple(kinds)
        self._share = share
        self._seed = seed

    async def corrupt(self, items: Sequence[RewriteItem]) -> list[Corruption]:
        """A text that a kind leaves as it was (facts without a number or a name) is no corruption."""
        found = []
        for index, item in enumerate(items):
            chance = random.Random(f"{self._seed} {item.sample_id}")
            kind = chance.choice(self._kinds)
            text = KINDS[kind](item.suffix.text, items[index - 1].suffix.text, self._share, chance)
            same = text.split() == item.suffix.text.split()
            found.append(Corruption(None, kind, "unchanged") if same else Corruption(text, kind))
        return found


def _replace(text: str, donor: str, share: float, chance: random.Random) -> str:
    """Words of the donor in place of a share of the words, at least one."""
    words, others = _PARTS.findall(text), donor.split() or ["..."]
    places = [index for index, part in enumerate(words) if not part.isspace()]
    for index in chance.sample(places, max(1, round(share * len(places))) if places else 0):
        words[index] = chance.choice(others)
    return "".join(words)


def _shuffle(text: str, donor: str, share: float, chance: random.Random) -> str:
    """The words in another order, white space where it was."""
    words = text.split()
    chance.shuffle(words)
    return _with_words(text, words)


def _swap(text: str, donor: str, share: float, chance: random.Random) -> str:
    """Another document's suffix."""
    return donor


def _repeat(text: str, donor: str, share: float, chance: random.Random) -> str:
    """The first words again and again, as many as the whole had."""
    words = text.split()
    period = max(1, round(len(words) * share / 2))
    return _with_words(text, [words[index % period] for index in range(len(words))])


def _with_words(text: str, words: Sequence[str]) -> str:
    """The text with other words in its white space."""
    new = iter(words)
    return "".join(part if part.isspace() else next(new) for part in _PARTS.findall(text))


def _facts(text: str, donor: str, share: float, chance: random.Random) -> str:
    """Other numbers and names; without any in the donor, other digits and nothing for names."""
    names = [word for word in _FACT.findall(donor) if not word.isdigit()]

    def other(match: re.Match[str]) -> str:
        word = match.group()
        if word.isdigit():
            return "".join(chance.choice("0123456789") for _ in word)
        return chance.choice(names) if names else word

    return _FACT.sub(other, text)


KINDS: dict[str, Callable[[str, str, float, random.Random], str]] = {
    "replace": _replace,
    "shuffle": _shuffle,
    "swap": _swap,
    "repeat": _repeat,
    "facts": _facts,
}
