"""The embedded rewriters: plain rules. They tidy text; they do not improve what it says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sip.teacher.interfaces import Rewrite, RewriteItem
from megatron_sip.teacher.safety import WordList

_INNER_SPACES = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
_TRAILING_SPACES = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_MIN_REPEATED = 12
"""Shorter lines and sentences ("}", "Returns:") may well stand twice."""


class CopyRewriter:
    """Gives each suffix back as it is."""

    async def rewrite(self, items: Sequence[RewriteItem]) -> list[Rewrite]:
        return [Rewrite(item.suffix.text, copied=True) for item in items]


class RuleRewriter:
    """Masks listed words, drops control characters, repeated lines and sentences, and superfluous white space.

    Indentation stays: in documentation it carries meaning. A text that no rule changes is a copy.
    """

    def __init__(self, words: WordList) -> None:
        self._words = words

    async def rewrite(self, items: Sequence[RewriteItem]) -> list[Rewrite]:
        return [self._rewrite(item.suffix.text) for item in items]

    def _rewrite(self, suffix: str) -> Rewrite:
        text = self._words.mask(_CONTROL.sub("", suffix))
        text = _drop_repeated_lines(text)
        text = _drop_repeated_sentences(text)
        text = _BLANK_LINES.sub("\n\n", _TRAILING_SPACES.sub("", _INNER_SPACES.sub(" ", text)))
        if not text.strip():
            return Rewrite(None, failure="nothing left")
        return Rewrite(text, copied=text == suffix)


def _drop_repeated_lines(text: str) -> str:
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        content = " ".join(line.split())
        if len(content) < _MIN_REPEATED or content not in seen:
            kept.append(line)
        seen.add(content)
    return "\n".join(kept)


def _drop_repeated_sentences(text: str) -> str:
    """Within a line, so that the breaks between lines stay."""
    seen: set[str] = set()
    lines = []
    for line in text.split("\n"):
        kept = []
        sentences = _SENTENCE_END.split(line)
        for sentence in sentences:
            if len(sentence) < _MIN_REPEATED or sentence not in seen:
                kept.append(sentence)
            seen.add(sentence)
        lines.append(line if len(kept) == len(sentences) else " ".join(kept))
    return "\n".join(lines)
