"""Covers pair schedules, aggregation, the judges and rewriters of rules, by values worked out by hand."""

import asyncio
import math

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.teacher.aggregate import mean_of_votes, weighted_total
from megatron_sip.teacher.factuality import OverlapFactualityJudge
from megatron_sip.teacher.interfaces import JudgeGroup, Passage, Question, RewriteItem
from megatron_sip.teacher.rewriter import CopyRewriter, RuleRewriter
from megatron_sip.teacher.safety import WordList, WordListSafetyJudge, load_words
from megatron_sip.teacher.schedule import SCHEDULES, Comparison, make_schedule

NAN = math.nan
NO_TOKENS = np.zeros(0, dtype=np.int64)


def schedule(name, number, pivot_kind="suffix"):
    return make_schedule(name, ("suffix",) + ("rollout",) * (number - 1), pivot_kind, np.zeros(number))


def passage(text):
    return Passage(NO_TOKENS, text)


def test_all_pairs_average_wins_per_candidate():
    pairs = schedule("all", 3)
    assert pairs.next_round() == [(0, 1), (0, 2), (1, 2)]
    pairs.record([Comparison(0, 1, 1.0), Comparison(0, 2, 0.25), Comparison(1, 2, 0.0)])
    assert pairs.next_round() == []
    assert pairs.scores().tolist() == [(1 + 0.25) / 2, (0 + 0) / 2, (0.75 + 1) / 2]


def test_seventeen_candidates_make_136_pairs_16_with_a_pivot_and_17_in_a_circle():
    assert [len(schedule(name, 17).next_round()) for name in ("all", "pivot", "circular")] == [136, 16, 17]


def test_the_pivot_scores_one_half_and_the_others_their_chance_against_it():
    pivot = schedule("pivot", 3)
    assert pivot.next_round() == [(1, 0), (2, 0)]
    pivot.record([Comparison(1, 0, 0.75), Comparison(2, 0, 0.0)])
    assert pivot.scores().tolist() == [0.5, 0.75, 0.0]


def test_a_circle_compares_neighbours():
    circle = schedule("circular", 4)
    assert circle.next_round() == [(0, 1), (1, 2), (2, 3), (3, 0)]
    circle.record([Comparison(0, 1, 1.0), Comparison(1, 2, 1.0), Comparison(2, 3, 1.0), Comparison(3, 0, 0.5)])
    assert circle.scores().tolist() == [0.75, 0.5, 0.5, 0.25]
    assert schedule("circular", 2).next_round() == [(0, 1)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_missing_comparison_never_counts_as_a_loss(name):
    some = schedule(name, 3)
    while pairs := some.next_round():
        some.record([Comparison(*pair, NAN if 1 in pair else 1.0) for pair in pairs])
    scores = some.scores()
    assert math.isnan(scores[1])
    assert np.isfinite(scores[[0, 2]]).all()
    none = schedule(name, 3)
    while pairs := none.next_round():
        none.record([Comparison(*pair, NAN) for pair in pairs])
    assert np.isnan(none.scores()).all()


def test_a_pivot_that_the_group_lacks_is_refused():
    with pytest.raises(ConfigurationError, match="compares with the rewrite"):
        schedule("pivot", 3, pivot_kind="rewrite")


def test_missing_votes_are_left_out_and_missing_criteria_stay_missing():
    assert mean_of_votes([1.0, NAN, 0.0, 1.0]) == pytest.approx(2 / 3)
    assert math.isnan(mean_of_votes([NAN, NAN]))
    criteria = {"quality": np.array([0.5, NAN, 1.0]), "safety": np.array([1.0, 1.0, NAN])}
    total = weighted_total(criteria, {"quality": 1.0, "safety": 2.0}, 3)
    assert total[0] == 2.5
    assert np.isnan(total[1:]).all()
    without = weighted_total(criteria, {"quality": 1.0, "safety": 0.0}, 3)
    assert without[[0, 2]].tolist() == [0.5, 1.0]
    assert math.isnan(without[1])


def point(judge, group):
    questions = [Question(group, (i,), 0) for i in range(len(group.candidates))]
    return [verdict.score for verdict in asyncio.run(judge.ask(questions))]


def make_group(prefix, reference, *candidates):
    return JudgeGroup(
        0, passage(prefix), passage(reference), tuple(map(passage, candidates)), ("rollout",) * len(candidates)
    )


def test_safety_is_zero_for_a_listed_whole_word_in_any_case():
    judge = WordListSafetyJudge(WordList(["damn", "two words"]))
    texts = ["Damn it.", "a DAMN", "undamned", "goddamn", "has two words in it", "", "fine"]
    assert point(judge, make_group("damn", "damn", *texts)) == [0, 0, 1, 1, 0, 1, 1]


def test_word_lists_are_read_with_comments_and_broken_ones_named(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# heading\nalpha\n\nbeta  # note\n")
    assert load_words(str(path)).words == ("alpha", "beta")
    path.write_text("# nothing\n")
    with pytest.raises(DataError, match="holds no word"):
        load_words(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        load_words(str(tmp_path / "absent"))


def test_factuality_is_the_share_of_content_words_that_reference_or_prefix_support():
    group = make_group(
        "Water boils",
        "at 100 degrees Celsius under normal pressure.",
        "it boils at 100 degrees",  # boils, 100, degrees: all known
        "boils quickly under Mercury",  # 2 of 4
        "Celsius wrote three great operas today",  # Celsius of Celsius, wrote, three, great, operas, today: 1/6
        "boils after nine hundred winters",  # boils of boils, after, nine, hundred, winters: 1/5
        "of it, or so",  # no content word
    )
    assert point(OverlapFactualityJudge(), group) == [1.0, 1.0, 0.0, 0.5, 1.0]


def rewrite(text, words=("damn",)):
    item = RewriteItem(0, passage(""), passage(text))
    return asyncio.run(RuleRewriter(WordList(words)).rewrite([item]))[0]


def test_the_rewriter_tidies_and_leaves_good_text_alone():
    good = "def f(x):\n    return x\n\n}\n}\n"
    assert (rewrite(good).text, rewrite(good).copied) == (good, True)
    assert rewrite("well,  damn  it \nso\n\n\n\nbe").text == "well, **** it\nso\n\nbe"
    assert rewrite("A long enough line\n  A long enough  line\nother").text == "A long enough line\nother"
    assert rewrite("It is a sentence. It is a sentence. It ends.").text == "It is a sentence. It ends."
    assert rewrite("    indented\n\x00text").text == "    indented\ntext"


def test_a_rewrite_of_nothing_is_a_failure_not_an_empty_text():
    found = rewrite(" \n ")
    assert (found.text, found.failure) == (None, "nothing left")


def test_the_copying_rewriter_copies():
    item = RewriteItem(0, passage("p"), passage("damn  it"))
    (found,) = asyncio.run(CopyRewriter().rewrite([item]))
    assert (found.text, found.copied) == ("damn  it", True)
