"""Finds the name that a user probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(word: str, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """`` (did you mean `x`?)`` with the nearest known name, or nothing if none is near.

    ``others``: further names to compare with -> the known name that is meant by them.
    """
    meant = {**(others or {}), **{name: name for name in known}}
    near = difflib.get_close_matches(word.lower(), meant, n=1, cutoff=0.6)
    return f" (did you mean {meant[near[0]]}?)" if near else ""
