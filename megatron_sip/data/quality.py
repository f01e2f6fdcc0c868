"""Quality rules: the paper's unsafe subset from RedPajama-V2's signals, and Gopher's rules from the text itself.

Sources: Self-Improving Pretraining (arXiv 2601.21343), Figure 12; Gopher (arXiv 2112.11446), table A1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SignalRule = Callable[[Mapping[str, Any]], bool]
TextRule = Callable[[str], bool]

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "\u2013", "-", "*")
_LETTER = re.compile(r"[^\W\d_]")


def signal(signals: Mapping[str, Any], name: str) -> float | None:
    """Document-level value of a signal, ``[[0, length, value]]``; None if it is absent or null."""
    spans = signals.get(name)
    if not spans:
        return None
    value = spans[0][2]
    return None if value is None else float(value)


def line_sum(signals: Mapping[str, Any], name: str) -> float:
    """Sum over the lines of a line-level signal; absent is 0."""
    return sum(float(span[2] or 0) for span in signals.get(name) or ())


def _between(name: str, low: float, high: float) -> SignalRule:
    def rule(signals: Mapping[str, Any]) -> bool:
        value = signal(signals, name)
        return value is not None and low <= value <= high

    return rule


def _bullet_share(signals: Mapping[str, Any]) -> bool:
    lines = signal(signals, "ccnet_nlines")
    return bool(lines) and line_sum(signals, "rps_lines_start_with_bulletpoint") / (lines or 1) <= 0.9


def _curses(signals: Mapping[str, Any]) -> bool:
    return (signal(signals, "rps_doc_ldnoobw_words") or 0) >= 5


def _is_on_blocklist(signals: Mapping[str, Any]) -> bool:
    # Category number 0 is a category.
    return signal(signals, "rps_doc_ut1_blacklist") is not None


def unsafe_subset_rules(reading: str) -> list[tuple[str, SignalRule]]:
    """Figure 12 of the paper: passable text that is likely unsafe. ``reading``: ``code`` (and) or ``text`` (or)."""
    rules = [
        ("word count", _between("rps_doc_word_count", 50, 100_000)),
        ("mean word length", _between("rps_doc_mean_word_length", 3, 10)),
        ("symbols per word", _between("rps_doc_symbol_to_word_ratio", float("-inf"), 0.1)),
        ("bullet lines", _bullet_share),
        ("top 2-gram", _between("rps_doc_frac_chars_top_2gram", float("-inf"), 0.2)),
    ]
    if reading == "text":
        return [*rules, ("curse words or blocklist", lambda signals: _curses(signals) or _is_on_blocklist(signals))]
    return [*rules, ("curse words", _curses), ("blocklist", _is_on_blocklist)]


def _word_count(text: str) -> bool:
    return 50 <= len(text.split()) <= 100_000


def _mean_word_length(text: str) -> bool:
    words = text.split()
    return bool(words) and 3 <= sum(map(len, words)) / len(words) <= 10


def _symbols(text: str) -> bool:
    num_words = len(text.split())
    return max(text.count("#"), text.count("...") + text.count("…")) <= 0.1 * num_words


def _share_of_lines(text: str, test: Callable[[str], bool]) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sum(map(test, lines)) / len(lines) if lines else 0.0


def _bullet_lines(text: str) -> bool:
    return _share_of_lines(text, lambda line: line.startswith(_BULLETS)) <= 0.9


def _ellipsis_lines(text: str) -> bool:
    return _share_of_lines(text, lambda line: line.endswith(("...", "…"))) <= 0.3


def _words_with_letters(text: str) -> bool:
    words = text.split()
    return sum(_LETTER.search(word) is not None for word in words) >= 0.8 * len(words)


def _stop_words(text: str) -> bool:
    return len(_STOP_WORDS.intersection(text.lower().split())) >= 2


def top_ngram_share(words: Sequence[str], n: int) -> float:
    """Characters of the most frequent n-gram, all its occurrences, over the characters of all words."""
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not grams:
        return 0.0
    gram, count = max(grams.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
    return count * sum(map(len, gram)) / sum(map(len, words)) if count > 1 else 0.0


def _repetition(text: str) -> bool:
    words = text.split()
    return all(top_ngram_share(words, n) <= limit for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)))


GOPHER_RULES: tuple[tuple[str, TextRule], ...] = (
    ("word count", _word_count),
    ("mean word length", _mean_word_length),
    ("symbols per word", _symbols),
    ("bullet lines", _bullet_lines),
    ("ellipsis lines", _ellipsis_lines),
    ("words with letters", _words_with_letters),
    ("stop words", _stop_words),
    ("repetition", _repetition),
)
