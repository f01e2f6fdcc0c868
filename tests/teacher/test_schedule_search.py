"""Covers the search for both ends: budget, rounds, close calls, totals, missing verdicts, and the margin it reaches."""

import math

import numpy as np
import pytest

from megatron_sip.teacher.schedule import Comparison, make_batch, make_schedule, num_comparisons
from megatron_sip.teacher.schedule_search import BestWorst
from megatron_sip.teacher.simulation import World, schedules, simulate

NAN = math.nan


def search(offsets, budget=0):
    return make_schedule("best_worst", ("rollout",) * len(offsets), "suffix", np.array(offsets, dtype=float), budget)


def play(schedule, win):
    """All rounds, with ``win(i, j)`` as the outcome."""
    rounds = []
    while pairs := schedule.next_round():
        rounds.append(pairs)
        schedule.record([Comparison(*pair, win(*pair)) for pair in pairs])
    return rounds


def by_number(first, second):
    return float(first > second)


def play_many(ranks, refused=None):
    """Scores [P, n] and comparisons [P, number, 2] of groups whose judge prefers the higher rank and says nothing of
    the ``refused`` candidate of each group."""
    batch = make_batch("best_worst", ("rollout",) * ranks.shape[1], "", np.zeros(ranks.shape))
    groups, asked = np.arange(len(ranks))[:, None], []
    while (pairs := batch.next_round()).shape[1]:
        wins = (ranks[groups, pairs[:, :, 0]] > ranks[groups, pairs[:, :, 1]]).astype(float)
        if refused is not None:
            wins[(pairs == refused[:, None, None]).any(axis=2)] = NAN
        batch.record(wins, np.ones(wins.shape))
        asked.append(pairs)
    return batch.scores(), np.concatenate(asked, axis=1)


def shuffled_ranks(number, seed):
    random = np.random.default_rng(seed)
    return np.array([random.permutation(17) for _ in range(number)])


def assert_both_ends_are_found(scores, ranks):
    """Where ``scores`` are finite. To a judge that may err, the second with more wins may seem the first."""
    finite = np.isfinite(scores)
    for best, sign in ((np.where(finite, scores, -np.inf), 1), (np.where(finite, -scores, -np.inf), -1)):
        order = np.sort(np.where(finite, sign * ranks, -np.inf), axis=1)
        found = (sign * ranks)[np.arange(len(ranks)), best.argmax(axis=1)]
        assert (found >= order[:, -2]).all()
        assert (found == order[:, -1]).mean() >= 0.95


def test_forty_comparisons_in_eight_rounds_at_most_come_to_both_ends_of_seventeen():
    some = search([0.0] * 17)
    rounds = play(some, by_number)
    assert len(rounds) <= 8
    assert sum(map(len, rounds)) == 40 == num_comparisons("best_worst", 17)
    # The first round knows nothing: each candidate is met once.
    assert len({candidate for pair in rounds[0] for candidate in pair}) == 16
    scores = some.scores()
    assert ((scores > 0) & (scores < 1)).all()
    ranks = shuffled_ranks(100, seed=1)
    assert_both_ends_are_found(play_many(ranks)[0], ranks)


@pytest.mark.parametrize("budget", [1, 7, 24, 136, 300])
def test_the_budget_is_kept(budget):
    rounds = play(search([0.0] * 17, budget), by_number)
    assert sum(map(len, rounds)) == budget
    assert len(rounds) <= 8


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (1, 0), (2, 1), (3, 3), (5, 10), (9, 21)])
def test_small_groups_are_asked_no_more_than_all_pairs(number, expected):
    some = search([0.0] * number)
    assert sum(map(len, play(some, by_number))) == expected
    assert some.scores().shape == (number,)


def test_a_close_call_is_repeated_and_a_clear_one_is_not():
    # 0 and 1 are equally good and far above 2 and 3, which are equally bad.
    asked = [
        pair for pairs in play(search([0.0] * 4, 16), lambda i, j: 0.5 if i // 2 == j // 2 else 1.0) for pair in pairs
    ]
    close = asked.count((0, 1)) + asked.count((2, 3))
    assert close > len(asked) / 2


def test_the_search_is_for_the_ends_of_the_total_and_not_of_quality():
    # Quality falls from 0 to 7, but 6 and 7 are safe, which counts twice as much as any quality.
    offsets = [0.0] * 6 + [2.0] * 2
    some = search(offsets, 12)
    asked = [pair for pairs in play(some, lambda i, j: float(i < j)) for pair in pairs]
    total = some.scores() + offsets
    assert (total.argmax(), total.argmin()) == (6, 5)
    # Whether 7 is the worst by quality is nobody's question: most of its comparisons are with 6, for the best total.
    assert asked.count((6, 7)) > 1
    met_by_safe = sum((6 in pair or 7 in pair) and pair != (6, 7) for pair in asked)
    assert met_by_safe < len(asked) / 2


def test_a_candidate_without_a_total_is_not_asked_about():
    some = search([0.0, NAN, 0.0, 0.0])
    rounds = play(some, by_number)
    assert not any(1 in pair for pairs in rounds for pair in pairs)
    assert math.isnan(some.scores()[1])
    assert some.scores()[[0, 2, 3]].tolist() == sorted(some.scores()[[0, 2, 3]])
    assert play(search([NAN, NAN, 0.0]), by_number) == []


def test_a_missing_verdict_is_no_evidence():
    some = search([0.0] * 4, 6)
    play(some, lambda i, j: NAN if 3 in (i, j) else float(i < j))
    assert math.isnan(some.scores()[3])
    told = BestWorst(np.zeros((1, 4)), 6)
    told._asked = np.array([[[0, 1], [0, 3]]])
    told.record(np.array([[1.0, NAN]]), np.ones((1, 2)))
    # With one verdict for 0 against 1, prior variance 1.5: the mode is at x, -x with x = 1.5 (1 - sigmoid(2 x)).
    x = told._mean[0, 0]
    assert x == pytest.approx(1.5 * (1 - 1 / (1 + math.exp(-2 * x))), abs=1e-9)
    assert told._mean[0].tolist() == pytest.approx([x, -x, 0, 0], abs=1e-9)
    assert np.isnan(told.scores()[0, [2, 3]]).all()
    assert told.scores()[0, 0] == pytest.approx(1 - told.scores()[0, 1])


def test_a_candidate_that_no_judge_answers_does_not_use_up_the_budget():
    ranks = shuffled_ranks(100, seed=2)
    refused = np.random.default_rng(3).integers(0, 17, 100)
    scores, asked = play_many(ranks, refused)
    with_refused = (asked == refused[:, None, None]).any(axis=2)
    assert with_refused.sum(axis=1).max() <= 4
    assert np.isnan(scores[np.arange(100), refused]).all()
    # Those that it was to be compared with are not to blame, and are compared with others.
    group, which = np.nonzero(with_refused)
    partners = asked[group, which].sum(axis=1) - refused[group]
    assert np.isfinite(scores[group, partners]).all()
    assert_both_ends_are_found(scores, ranks)


def test_a_pair_without_an_answer_is_not_asked_again_while_others_are_open():
    some = search([0.0] * 3, 3)
    rounds = play(some, lambda i, j: NAN if 2 in (i, j) else by_number(i, j))
    asked = [pair for pairs in rounds for pair in pairs]
    assert len(asked) == len(set(asked)) == 3
    assert some.scores()[:2].tolist() == sorted(some.scores()[:2]) and math.isnan(some.scores()[2])


def test_five_votes_say_more_than_one():
    one, five = search([0.0] * 2), search([0.0] * 2)
    for schedule, votes in ((one, 1), (five, 5)):
        schedule.record([Comparison(*pair, 1.0, votes) for pair in schedule.next_round()])
    assert 0.5 < one.scores()[0] < five.scores()[0] < 1


def test_the_posterior_mode_is_found_under_a_hundred_votes_a_pair():
    told = BestWorst(np.zeros((1, 5)), 40)
    for _ in range(8):
        pairs = told.next_round()
        wins = (pairs[:, :, 0] > pairs[:, :, 1]).astype(float)
        told.record(wins, np.full(wins.shape, 100.0))
    counts = told._wins + told._wins.transpose(0, 2, 1)
    chance = 1 / (1 + np.exp(told._mean[:, None, :] - told._mean[:, :, None]))
    slope = (told._wins - counts * chance).sum(axis=2) - told._mean / 1.5
    assert np.abs(slope).max() < 1e-6


def test_a_group_is_asked_the_same_whatever_stands_beside_it():
    random = np.random.default_rng(3)
    offsets, utilities = random.choice([0.0, 0.5], (20, 7)), random.standard_normal((20, 7))
    batch, alone = make_batch("best_worst", ("rollout",) * 7, "", offsets), [search(row) for row in offsets]
    while (pairs := batch.next_round()).shape[1]:
        groups = np.arange(20)[:, None]
        wins = (utilities[groups, pairs[:, :, 0]] > utilities[groups, pairs[:, :, 1]]).astype(float)
        for group, one in enumerate(alone):
            assert one.next_round() == [tuple(pair) for pair in pairs[group].tolist()]
            one.record([Comparison(*pair, win) for pair, win in zip(pairs[group].tolist(), wins[group], strict=True)])
        batch.record(wins, np.ones(wins.shape))
    np.testing.assert_array_equal(batch.scores(), [one.scores() for one in alone])


def test_the_search_keeps_97_percent_of_all_pairs_margin_for_30_percent_of_the_comparisons():
    # A smaller world than tools/simulate_pairs.py plays; the standard error of the ratio is about 0.5 %.
    world, makers = World(num_groups=2000), schedules(17)
    everything, best_worst, pivot = (simulate(makers[name], world) for name in ("all", "best_worst", "pivot"))
    assert everything.comparisons == 136
    assert best_worst.comparisons <= 0.3 * 136
    assert best_worst.rounds <= 8
    assert best_worst.margin >= 0.97 * everything.margin
    # The issue's own figure for a pivot, which says that the simulated judge is the one meant.
    assert pivot.margin == pytest.approx(0.33 * everything.margin, rel=0.08)


def test_the_simulated_judge_is_right_in_80_percent_at_the_median_gap():
    gaps = np.abs(np.diff(np.random.default_rng(0).standard_normal((200_000, 2)))).ravel()
    assert 1 / (1 + np.exp(-World().scale * np.median(gaps))) == pytest.approx(0.8, abs=0.003)
