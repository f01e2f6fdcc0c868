"""Outcomes, win rates and intervals, by hand."""

import math

import numpy as np
import pytest

from megatron_sip.evaluation.win_rate import bootstrap_interval, coherence_outcomes, outcomes, wilson_interval, win_rate

NAN = math.nan


def test_the_higher_score_wins_equal_scores_tie_and_a_missing_score_is_no_verdict():
    policy = np.array([1.0, 0.2, 0.5, NAN, 0.5])
    baseline = np.array([0.0, 0.3, 0.5, 0.1, NAN])
    assert outcomes(policy, baseline).tolist() == pytest.approx([1.0, 0.0, 0.5, NAN, NAN], nan_ok=True)


def test_ties_count_half_and_missing_verdicts_count_nowhere():
    result = win_rate(np.array([1.0, 1.0, 0.5, 0.0, NAN]))
    assert (result.wins, result.ties, result.losses, result.missing) == (2, 1, 1, 1)
    assert result.num_prefixes == 4
    assert result.rate == 2.5 / 4


def test_the_rate_is_the_mean_over_prefixes_of_the_means_over_seeds():
    # Prefix means 1 (one verdict) and 1/3: the first prefix is not outweighed by the second's three verdicts.
    result = win_rate(np.array([[1.0, NAN, NAN], [1.0, 0.0, 0.0]]))
    assert result.rate == pytest.approx((1.0 + 1 / 3) / 2)


def test_without_any_verdict_there_is_no_rate():
    result = win_rate(np.array([[NAN], [NAN]]))
    assert math.isnan(result.rate) and math.isnan(result.low)
    assert (result.num_prefixes, result.missing) == (0, 2)


def test_the_bootstrap_interval_is_that_of_the_normal_approximation():
    # 600 prefixes, 360 wins: standard error sqrt(.6 * .4 / 600) = 0.02, so 0.6 -+ 0.0392.
    low, high = bootstrap_interval(np.array([1.0] * 360 + [0.0] * 240))
    assert (low, high) == pytest.approx((0.5608, 0.6392), abs=0.004)


def test_seeds_of_one_prefix_do_not_narrow_the_interval():
    one = np.array([1.0] * 36 + [0.0] * 24)
    copies = np.repeat(one[:, None], 8, axis=1)
    assert win_rate(copies).low == win_rate(one).low


def test_the_interval_is_reproducible_and_depends_on_the_seed():
    means = np.linspace(0, 1, 50)
    assert bootstrap_interval(means, seed=1) == bootstrap_interval(means, seed=1)
    assert bootstrap_interval(means, seed=1) != bootstrap_interval(means, seed=2)


def test_all_wins_do_not_prove_a_rate_of_one():
    # Wilson at 10 of 10: 1 / (1 + z^2 / 10) with z = 1.959964.
    assert win_rate(np.ones(10)).low == pytest.approx(10 / (10 + 1.959964**2))
    assert win_rate(np.ones(10)).high == pytest.approx(1.0)


def test_wilson_interval_of_a_published_example():
    # 81 of 263 (Newcombe 1998, table I): 0.2553 to 0.3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    # 0 of 20 of the same table: 0 to 0.1611.
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_coherence_asks_only_which_continuation_repeats_itself_less():
    policy = [[1, 2, 3, 4], [5, 5, 5, 5], [1, 2, 3, 4], [9]]
    baseline = [[1, 2, 1, 2], [1, 2, 3, 4], [6, 7, 8, 9], [9, 9, 9]]
    assert coherence_outcomes(policy, baseline).tolist() == [1.0, 0.0, 0.5, 1.0]
