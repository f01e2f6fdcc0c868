"""Statistics of judges, against votes whose answers are plain to see."""

from __future__ import annotations

import math

import pytest

from megatron_sip.evaluation.judge_bench import (
    AS_IS,
    BAD_COMPLETE,
    GOOD_COMPLETE,
    Vote,
    accuracy_by_source,
    agreement,
    completed,
    confusion,
    cut_off,
    pair_biases,
)

NAN = float("nan")


def pair(example: int, first: float, second: float, source: str = "wiki", form: str = AS_IS) -> list[Vote]:
    """Votes for the good option, standing first and second."""
    return [Vote(example, source, form, True, 0, first), Vote(example, source, form, False, 0, second)]


def test_accuracy_is_per_source_and_over_examples() -> None:
    votes = [*pair(0, 1, 1), *pair(1, 1, 0), *pair(2, 0, 0, "book"), *pair(3, NAN, 1, "book"), *pair(4, NAN, NAN)]
    found = accuracy_by_source(votes)
    assert {source: share.mean for source, share in found.items()} == {"book": 0.5, "wiki": 0.75, "all": 0.625}
    assert found["all"].count == 4
    # Means 1, 1/2, 0, 1: deviation sqrt((9 + 1 + 25 + 9) / 64 / 3) = 0.478714, over sqrt(4), times 1.96.
    assert found["all"].half_width == pytest.approx(1.96 * 0.478714 / 2, abs=1e-5)


def test_a_judge_that_takes_the_first_option_always_flips_and_is_half_right() -> None:
    votes = [vote for example in range(4) for vote in pair(example, 1, 0)]
    biases = pair_biases(votes)
    assert (biases.first_share.mean, biases.flips.mean) == (1.0, 1.0)
    assert accuracy_by_source(votes)["all"].mean == 0.5


def test_a_right_judge_has_no_bias_and_missing_votes_are_counted() -> None:
    biases = pair_biases([*pair(0, 1, 1), *pair(1, 1, NAN)])
    assert biases.first_share.mean == pytest.approx(0.75)  # by example: (1 + 0) / 2 and 1
    assert (biases.flips.mean, biases.flips.count) == (0.0, 1)
    assert biases.missing == 0.25


def test_cut_off_continuations_that_lose_show_as_a_completeness_bias() -> None:
    votes = [*pair(0, 1, 1), *pair(0, 1, 1, form=GOOD_COMPLETE), *pair(0, 0, 1, form=BAD_COMPLETE)]
    votes += [*pair(1, 1, 1), *pair(1, 1, 1, form=GOOD_COMPLETE), *pair(1, 0, 0, form=BAD_COMPLETE)]
    assert pair_biases(votes).completeness == 0.75
    assert accuracy_by_source(votes)["all"].mean == 1.0  # only of pairs as they are


def test_confusion_counts_majorities_by_name() -> None:
    def label(example: int, form: str, *values: float) -> list[Vote]:
        return [Vote(example, "wiki", form, True, number, value) for number, value in enumerate(values)]

    votes = [
        *label(0, "suffix", 1.0, 1.0, 0.0),
        *label(1, "suffix", 0.5),
        *label(2, "model", NAN),
        *label(3, "model", 0.0, 0.5),
    ]
    found = {form: dict(counts) for form, counts in confusion(votes, "factuality").items()}
    assert found == {"suffix": {"No Hallucination": 1, "Possible": 1}, "model": {"missing": 1, "Definite": 1}}
    safety = confusion([*label(0, "safe", 0.0), *label(1, "safe", 1.0), *label(2, "safe", 0.25)], "safety")
    assert dict(safety["safe"]) == {"unsafe": 1, "safe": 1, "0.25": 1}


def test_agreement_is_also_given_beyond_chance() -> None:
    ours = [vote for example, value in enumerate((1, 1, 0, 0)) for vote in pair(example, value, value)]
    theirs = [vote for example, value in enumerate((1, 0, 0, 0)) for vote in pair(example, value, value)]
    found = agreement(ours, theirs)
    # 3 of 4 alike; by chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    assert (found.share, found.kappa, found.count) == (0.75, pytest.approx(0.5), 8)
    assert math.isnan(agreement(ours, [Vote(9, "", AS_IS, True, 0, 1.0)]).share)


def test_judges_that_are_nearly_always_right_agree_beyond_chance() -> None:
    ours = [vote for example in range(4) for vote in pair(example, 1, 1)]
    theirs = [*ours[:-1], Vote(3, "wiki", AS_IS, False, 0, 0.0)]
    found = agreement(ours, theirs)
    # They name the first option 4 and 5 times of 8: 1/2 by chance; 7 of 8 alike.
    assert (found.share, found.kappa) == (0.875, pytest.approx(0.75))


def test_texts_are_completed_at_a_sentence_end_and_cut_within_one() -> None:
    text = " The hill is high. Ada sees it and"
    assert completed(text) == " The hill is high."
    assert completed(" No end in sight, and") == " No end in sight, and."
    assert completed(" Yes. And then a very long part that does not end").endswith("end.")
    assert cut_off(text) == " The hill is high. Ada sees it"
    assert cut_off(" The hill is high.") == " The hill is"
