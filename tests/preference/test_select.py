"""Covers the choice of chosen and rejected, every reason to skip, and the sums behind the log's scalars."""

import math

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.preference import PreferenceConfig, preference_metrics, preference_sums, select
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Judgment, Sample

NAN = math.nan
S, W, R = CandidateKind.SUFFIX, CandidateKind.REWRITE, CandidateKind.ROLLOUT
KINDS = (S, W, R, R)


def group(tokens=([1], [2], [3], [4]), kinds=KINDS, sample_id=0):
    candidates = tuple(Candidate(k, np.array(t, dtype=np.int64)) for k, t in zip(kinds, tokens, strict=True))
    return CandidateGroup(Sample(sample_id, 0, np.array([9]), np.array([1])), candidates)


def judged(scores, tokens=([1], [2], [3], [4]), sample_id=0, **options):
    scores = np.array(scores, dtype=np.float64)
    judgment = Judgment(scores, {"quality": scores})
    return select([group(tokens, sample_id=sample_id)], [judgment], PreferenceConfig(**options))[0]


def outcome(preference):
    return preference.chosen, preference.rejected, preference.weight, preference.reason


def test_best_is_chosen_and_worst_rejected():
    assert outcome(judged([0.5, 0.1, 0.9, 0.4])) == (2, 1, 1.0, "")


def test_best_alone_has_no_rejected():
    assert outcome(judged([0.5, 0.1, 0.9, 0.4], preference_rule="best")) == (2, None, 1.0, "")


def test_a_missing_score_is_never_the_worst_and_the_others_still_count():
    assert outcome(judged([0.5, NAN, 0.9, 0.7])) == (2, 0, 1.0, "")
    assert outcome(judged([-5.0, NAN, -9.0, -7.0])) == (0, 2, 1.0, "")


@pytest.mark.parametrize("rule", ["best_vs_worst", "best"])
def test_fewer_than_two_scores_teach_nothing(rule):
    assert outcome(judged([NAN, NAN, 0.9, NAN], preference_rule=rule)) == (None, None, 0.0, "missing")
    assert outcome(judged([NAN] * 4, preference_rule=rule)) == (None, None, 0.0, "missing")


@pytest.mark.parametrize("rule", ["best_vs_worst", "best"])
def test_equal_scores_are_a_tie_also_when_they_differ_by_rounding(rule):
    rounded = [0.1 + 0.2, 0.3, 0.3, 0.3]
    assert rounded[0] != rounded[1]
    assert outcome(judged(rounded, preference_rule=rule)) == (None, None, 0.0, "tie")


def test_the_minimum_gap_makes_ties():
    assert judged([0.5, 0.4, 0.6, 0.5], preference_min_gap=0.2).reason == "tie"
    assert judged([0.5, 0.4, 0.61, 0.5], preference_min_gap=0.2).chosen == 2


def test_identical_chosen_and_rejected_teach_nothing():
    assert outcome(judged([0.9, 0.1, 0.5, 0.5], tokens=([7, 7], [7, 7], [3], [4]))) == (None, None, 0.0, "identical")
    assert judged([0.9, 0.1, 0.5, 0.5], tokens=([7, 7], [7], [3], [4])).reason == ""


@pytest.mark.parametrize("rule", ["best_vs_worst", "best"])
def test_a_group_of_copies_teaches_nothing_whatever_the_judge_says(rule):
    assert judged([0.9, 0.1, 0.5, 0.5], tokens=([7],) * 4, preference_rule=rule).reason == "identical"


def test_an_empty_candidate_is_never_chosen():
    assert outcome(judged([0.9, 0.5, 0.1, 0.2], tokens=([], [2], [3], [4]))) == (1, 2, 1.0, "")


def test_ties_for_the_best_are_broken_as_configured():
    scores = [0.9, 0.1, 0.9, 0.9]
    assert judged(scores, preference_tie_break="first").chosen == 0
    assert judged(scores, preference_tie_break="last").chosen == 3
    drawn = [judged(scores, sample_id=i).chosen for i in range(300)]
    assert drawn == [judged(scores, sample_id=i).chosen for i in range(300)], "depends on the sample alone"
    # 300 draws at 1/3 each: standard deviation 8.2.
    assert all(60 < drawn.count(i) < 140 for i in (0, 2, 3))
    assert 1 not in drawn


def test_a_fixed_order_asks_no_judge():
    config = PreferenceConfig(preference_rule="rewrite>rollout")
    assert config.num_candidates == 2
    assert outcome(select([group()], None, config)[0]) == (1, 2, 1.0, "")
    alone = PreferenceConfig(preference_rule="rollout")
    assert alone.num_candidates == 1
    assert outcome(select([group()], None, alone)[0]) == (2, None, 1.0, "")


def test_a_fixed_order_skips_missing_and_identical_candidates():
    config = PreferenceConfig(preference_rule="rewrite>rollout")
    assert select([group([[1], [3]], (S, R))], None, config)[0].reason == "missing"
    assert select([group([[1], [], [3]], (S, W, R))], None, config)[0].reason == "missing"
    assert select([group([[3], [3]], (W, R))], None, config)[0].reason == "identical"


@pytest.mark.parametrize("rule", ["worst", "rewrite>rewrite", "rewrite>rollout>suffix", "rewrite>nothing"])
def test_a_bad_rule_is_named(rule):
    with pytest.raises(ConfigurationError) as error:
        PreferenceConfig(preference_rule=rule).validate()
    assert repr(rule) in str(error.value)


def test_a_negative_gap_is_refused():
    with pytest.raises(ConfigurationError, match=r"-0\.5"):
        PreferenceConfig(preference_min_gap=-0.5).validate()


def test_rates_rewards_and_skips_are_those_of_all_replicas_together():
    one = [judged([0.5, 0.1, 0.9, 0.4]), judged([0.9, 0.1, NAN, 0.4])]
    two = [judged([0.3, 0.3, 0.3, 0.3]), judged([NAN] * 4)]
    sums = [preference_sums(one), preference_sums(two)]
    assert sums[0].keys() == sums[1].keys() == preference_sums([]).keys()
    metrics = preference_metrics({name: sums[0][name] + sums[1][name] for name in sums[0]})
    assert metrics["sip/pairs_skipped"] == 2
    assert metrics["sip/pairs_skipped/tie"] == metrics["sip/pairs_skipped/missing"] == 1
    assert metrics["sip/pairs_skipped/identical"] == 0
    assert [metrics[f"sip/chosen_rate/{k}"] for k in ("suffix", "rewrite", "rollout")] == [0.5, 0, 0.5]
    assert [metrics[f"sip/rejected_rate/{k}"] for k in ("suffix", "rewrite", "rollout")] == [0, 1, 0]
    scores = np.array([0.5, 0.1, 0.9, 0.4, 0.9, 0.1, 0.4, 0.3, 0.3, 0.3, 0.3])
    assert metrics["sip/reward/quality_mean"] == pytest.approx(scores.mean())
    assert metrics["sip/reward/quality_std"] == pytest.approx(scores.std())
    assert metrics["sip/score/suffix"] == pytest.approx((0.5 + 0.9 + 0.3) / 3)
    assert "sip/reward/safety_mean" not in metrics


def test_nothing_judged_reports_no_rate_instead_of_zero():
    assert set(preference_metrics(preference_sums([judged([NAN] * 4)]))) == {
        "sip/pairs_skipped",
        "sip/pairs_skipped/tie",
        "sip/pairs_skipped/missing",
        "sip/pairs_skipped/identical",
    }
