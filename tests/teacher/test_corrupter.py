"""Corruption by rules and by a model."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher.corrupter import KINDS, RuleCorrupter
from megatron_sip.teacher.interfaces import Passage, RewriteItem

NONE = np.zeros(0, dtype=np.int64)
SUFFIX = " In 1969 Ada went up the hill  to look\nat 12 stars."
DONOR = " Bob ate green soup."


def item(number: int, suffix: str) -> RewriteItem:
    return RewriteItem(number, Passage(NONE, "Once"), Passage(NONE, suffix))


def apply(kind: str, share: float = 0.4) -> str:
    return KINDS[kind](SUFFIX, DONOR, share, random.Random(1))


def test_replacing_changes_that_share_of_the_words_and_no_white_space() -> None:
    old, new = SUFFIX.split(), apply("replace", 0.25).split()
    changed = [b for a, b in zip(old, new, strict=True) if a != b]
    assert len(old) == 12 and len(changed) == 3 and set(changed) <= set(DONOR.split())
    assert [part for part in apply("replace") if part.isspace()] == [part for part in SUFFIX if part.isspace()]


def test_shuffling_keeps_the_words_and_repeating_only_the_first() -> None:
    shuffled = apply("shuffle")
    assert sorted(shuffled.split()) == sorted(SUFFIX.split()) and shuffled.split() != SUFFIX.split()
    repeated = apply("repeat", 0.4).split()
    assert len(repeated) == 12 and set(repeated) < set(SUFFIX.split()) and len(set(repeated)) <= 4


def test_facts_are_other_numbers_and_names() -> None:
    changed = apply("facts").split()
    kept = [(a, b) for a, b in zip(SUFFIX.split(), changed, strict=True) if a != b]
    assert {a for a, _ in kept} == {"In", "1969", "Ada", "12"}
    numbers = [b for a, b in kept if a.isdigit()]
    assert [len(number) for number in numbers] == [4, 2] and all(number.isdigit() for number in numbers)


def test_swapping_takes_the_suffix_of_the_item_before() -> None:
    found = asyncio.run(RuleCorrupter(["swap"]).corrupt([item(0, SUFFIX), item(1, DONOR), item(2, " x")]))
    assert [corruption.text for corruption in found] == [" x", SUFFIX, DONOR]


def test_a_text_that_stays_as_it_was_is_no_corruption() -> None:
    (found,) = asyncio.run(RuleCorrupter(["facts"]).corrupt([item(0, " nothing to see here")]))
    assert (found.text, found.failure) == (None, "unchanged")


def test_corruptions_depend_on_the_seed_and_not_on_what_else_is_asked() -> None:
    def texts(seed: int, *items: RewriteItem) -> list[str | None]:
        return [c.text for c in asyncio.run(RuleCorrupter(seed=seed).corrupt(items))]

    three = texts(1, item(0, DONOR), item(1, SUFFIX), item(2, DONOR))
    assert texts(1, item(0, DONOR), item(1, SUFFIX))[1] == three[1]
    assert texts(1, item(0, DONOR), item(1, SUFFIX), item(2, DONOR)) == three
    assert any(texts(seed, item(0, DONOR), item(1, SUFFIX))[1] != three[1] for seed in range(2, 6))


@pytest.mark.parametrize(("kinds", "share", "named"), [(["lie"], 0.4, "lie"), ([], 0.4, "''"), (["swap"], 0.0, "0.0")])
def test_kinds_and_shares_that_do_not_exist_are_refused(kinds: list[str], share: float, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        RuleCorrupter(kinds, share)
