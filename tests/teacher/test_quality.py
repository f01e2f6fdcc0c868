"""Covers resistance to cheating on real text (Python's documentation, held-out documents), and each term by itself.

What it does not cover: that a policy trained against the judge stays honest; that takes a training run.
"""

import asyncio

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError, DataError
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.interfaces import JudgeGroup, Passage, Question
from megatron_sip.teacher.ngram import fit_ngrams
from megatron_sip.teacher.quality import RECIPES, NgramQualityJudge, QualityRecipe, copied_share, gram_set, repetition
from tests.teacher.docs_text import PREFIX, SUFFIX, Corpus


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def model(corpus):
    lengths = np.array([len(document) for document in corpus.judge])
    return fit_ngrams(np.concatenate(corpus.judge), lengths, corpus.vocab_size)


def make_group(prefix, suffix, *candidates, kinds=None, sample_id=0):
    passages = [Passage(np.asarray(c, dtype=np.int64), "") for c in (prefix, suffix, *candidates)]
    return JudgeGroup(sample_id, passages[0], passages[1], tuple(passages[2:]), kinds or ("rollout",) * len(candidates))


def wins_against_real_text(judge, corpus, make):
    """Share of held-out samples in which ``make(prefix, suffix)`` beats the real suffix."""
    wins = []
    for prefix, suffix in corpus.samples(100):
        real, other = judge.scores(make_group(prefix, suffix, suffix, make(prefix, suffix)))
        wins.append(other > real)
    return np.mean(wins)


def test_one_repeated_token_beats_real_text_under_plain_log_probability_and_never_by_default(corpus, model):
    def repeat(prefix, suffix):
        return np.full(SUFFIX, corpus.id["-"])

    assert wins_against_real_text(NgramQualityJudge(model, RECIPES["plain"]), corpus, repeat) > 0.9
    default = NgramQualityJudge(model, TeacherConfig().quality_recipe)
    for token in np.unique(np.concatenate(corpus.judge))[:: corpus.vocab_size // 8]:
        assert wins_against_real_text(default, corpus, lambda p, s, token=token: np.full(SUFFIX, token)) <= 0.01


def test_a_loop_of_boilerplate_beats_real_text_under_plain_log_probability_and_rarely_by_default(corpus, model):
    phrase = [corpus.id[word] for word in ("\n", "Changed", "in", "version", "3", ".", "7", ":")]

    def loop(prefix, suffix):
        return np.tile(phrase, SUFFIX // len(phrase))

    assert wins_against_real_text(NgramQualityJudge(model, RECIPES["plain"]), corpus, loop) > 0.5
    # The documentation has tables of dashes and alike words: a few real suffixes are worse loops than this one.
    assert wins_against_real_text(NgramQualityJudge(model, TeacherConfig().quality_recipe), corpus, loop) <= 0.1


def test_shuffled_text_and_copies_of_the_prefix_and_stubs_lose_to_real_text(corpus, model):
    default, rng = NgramQualityJudge(model, TeacherConfig().quality_recipe), np.random.default_rng(0)
    assert wins_against_real_text(default, corpus, lambda p, s: rng.permutation(s)) <= 0.15
    assert wins_against_real_text(default, corpus, lambda p, s: p[PREFIX - SUFFIX :]) <= 0.15
    assert wins_against_real_text(default, corpus, lambda p, s: s[:2]) <= 0.2


def test_runs_of_random_digits_gain_nothing_once_digits_are_pooled():
    """A thousand documents of words (100 kinds) and of numbers (10 digits, a tenth of the text), both uniformly drawn.

    Within its kind any token has p = 1/100 or 1/10; alone .009 or .01, and pooled digits .1. So half of the unigram
    leaves log .01 - log(.009) / 2 = -2.25 for words, log .1 - log(.01) / 2 = 0 for digits, pooled -1.15.
    """
    rng = np.random.default_rng(0)
    documents = [rng.integers(10, 110, 100) if i % 10 else rng.integers(0, 10, 100) for i in range(1000)]
    values = []
    for pooled in ((), range(10)):
        model = fit_ngrams(np.concatenate(documents), np.full(1000, 100), vocab_size=110, order=2, pooled=pooled)
        judge = NgramQualityJudge(model, QualityRecipe(unigram_discount=0.5, repetition=0.0))
        words, digits = rng.integers(10, 110, 2000), rng.integers(0, 10, 2000)
        values.append(judge.scores(make_group([10], words, words, digits)))
    assert values[0] == pytest.approx([-2.25, 0.0], abs=0.1)
    assert values[1] == pytest.approx([-2.25, -1.15], abs=0.1)


def test_repetition_and_copying_are_shares_of_ngrams():
    assert repetition(np.arange(10)) == 0
    assert repetition(np.array([1, 1, 1, 1])) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert repetition(np.array([1])) == 0
    prefix = np.array([1, 2, 3, 4, 5, 9, 9])
    assert copied_share(np.array([2, 3, 4, 5, 7, 8]), gram_set(prefix)) == pytest.approx(1 / 3)
    assert copied_share(np.array([2, 3]), gram_set(prefix)) == 0


def test_the_score_is_the_mean_of_clipped_values_minus_penalties():
    # One document "0 1": p(0) = (1 + 2/4)/4, p(1) the same; p(1 | 0) = (1 + .375)/2 = .6875.
    model = fit_ngrams(np.array([0, 1]), np.array([2]), vocab_size=4, order=3)
    values = [np.log(0.375) / 2, np.log(0.6875) - np.log(0.375) / 2]
    group = make_group([], [3, 3, 3, 3], [0, 1])

    def score(**terms):
        recipe = QualityRecipe(unigram_discount=0.5, repetition=0.0).with_settings(terms)
        return NgramQualityJudge(model, recipe).scores(group)[0]

    assert score() == pytest.approx(np.mean(values))
    assert score(token_cap=0.0) == pytest.approx(values[0] / 2)
    assert score(token_floor=0.1) == pytest.approx((-0.1 + values[1]) / 2)
    assert score(shortness=1.0) == pytest.approx(np.mean(values) - 0.5)


def test_tokens_of_the_prefix_are_worth_more_with_a_cache():
    model = fit_ngrams(np.array([0, 1, 2, 3]), np.array([4]), vocab_size=6, order=3)
    recipe = QualityRecipe(unigram_discount=0.0, repetition=0.0, cache=0.2)
    scores = NgramQualityJudge(model, recipe).scores(make_group([4, 4, 4, 0], [1], [4], [5]))
    # p(5) is left with 4/5 of its share; p(4) gains a fifth of its frequency in the prefix, 3/4.
    p5 = np.exp(scores[1])
    assert np.exp(scores[0]) == pytest.approx(p5 + 0.2 * 0.75)


def rollouts_of(boilerplate, number, rng, vocab_size):
    return [
        make_group([], np.arange(16), np.concatenate([boilerplate, rng.integers(0, vocab_size, 8)]), sample_id=i)
        for i in range(number)
    ]


def test_what_is_written_for_every_prompt_loses_value_and_recovers_it(corpus, model):
    rng = np.random.default_rng(0)
    judge = NgramQualityJudge(model, RECIPES["plain"].with_settings({"overuse": 1.0}))
    phrase = rng.integers(0, corpus.vocab_size, 8)
    other = rng.integers(0, corpus.vocab_size, 8)
    group = make_group([], phrase, phrase, other)
    before = judge.scores(group)
    for _ in range(4):
        judge.observe(rollouts_of(phrase, 8, rng, corpus.vocab_size))
    overused = judge.scores(group)
    # In every prompt: log(1 / (2 x 0.02)) = 3.2, above the limit of 3.
    assert before - overused == pytest.approx([3.0, 0.0], abs=1e-9)
    for _ in range(250):
        judge.observe(rollouts_of(other[:0], 8, rng, corpus.vocab_size))
    assert judge.scores(group) == pytest.approx(before)


def test_real_suffixes_and_rewrites_do_not_count_as_overuse(corpus, model):
    judge = NgramQualityJudge(model, RECIPES["plain"].with_settings({"overuse": 1.0}))
    phrase = corpus.held_out[0][:8]
    for i in range(20):
        judge.observe([make_group([], phrase, phrase, phrase, kinds=("suffix", "rewrite"), sample_id=i)])
    fresh = NgramQualityJudge(model, RECIPES["plain"])
    group = make_group([], phrase, phrase)
    assert judge.scores(group) == pytest.approx(fresh.scores(group))


def test_running_statistics_survive_a_checkpoint(corpus, model):
    rng = np.random.default_rng(1)
    phrase = rng.integers(0, corpus.vocab_size, 8)
    batches = [rollouts_of(phrase, 4, rng, corpus.vocab_size) for _ in range(6)]
    straight, first, second = (NgramQualityJudge(model, RECIPES["robust"]) for _ in range(3))
    for batch in batches:
        straight.observe(batch)
    for batch in batches[:3]:
        first.observe(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.observe(batch)
    group = make_group([], phrase, phrase, phrase[::-1])
    assert np.array_equal(second.scores(group), straight.scores(group))
    assert second.identity() == straight.identity() != first.identity()


def test_a_comparison_goes_to_the_higher_score_whatever_the_order(corpus, model):
    judge = NgramQualityJudge(model, RECIPES["robust"])
    prefix, suffix = corpus.samples(3)[1]
    group = make_group(prefix, suffix, suffix, np.full(SUFFIX, 1), suffix, [])
    questions = [Question(group, options, 0) for options in ((0, 1), (1, 0), (0, 2), (0, 3))]
    verdicts = asyncio.run(judge.ask(questions))
    assert [v.score for v in verdicts[:3]] == [1.0, 0.0, 0.5]
    assert np.isnan(verdicts[3].score)
    assert verdicts[3].failure == "empty candidate"


def test_bad_settings_are_named():
    with pytest.raises(ConfigurationError, match="no 'tokencap'"):
        TeacherConfig(quality_settings={"tokencap": 1.0}).validate()
    with pytest.raises(ConfigurationError, match=r"cache is 1\.0"):
        TeacherConfig(quality_settings={"cache": 1.0}).validate()
    bigrams = fit_ngrams(np.array([0, 1]), np.array([2]), vocab_size=4, order=2)
    with pytest.raises(DataError, match="2-grams"):
        NgramQualityJudge(bigrams, RECIPES["robust"])
