"""Text statistics by hand, and alarms that ring when a policy degenerates and only then."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.observability.alarms import AlarmBell, PolicyHealth, exceeded, measure_health, measure_tokens
from megatron_sip.observability.config import ObservabilityConfig
from megatron_sip.observability.text_statistics import (
    distinct_n,
    max_token_share,
    mean_length,
    repeated_ngram_share,
    shared_ngram_share,
)
from megatron_sip.types import Candidate, CandidateGroup, CandidateKind, Sample


def test_distinct_2_pools_bigrams_over_continuations():
    # Bigrams: 12 23 | 12 24 -> 3 distinct of 4.
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 0.75


def test_max_token_share_is_of_all_tokens():
    # 7 occurs 3 times in 5 tokens.
    assert max_token_share([[7, 7, 1], [7, 2]]) == 0.6


def test_repeated_trigrams_count_within_a_continuation_only():
    # 1 2 1 2 1 -> trigrams 121 212 121: one of three repeats. The second continuation's 121 is its first.
    assert repeated_ngram_share([[1, 2, 1, 2, 1], [1, 2, 1]], 3) == 0.25


def test_shared_trigrams_count_prefixes_and_not_occurrences():
    groups = [
        [[1, 2, 3, 4], [1, 2, 3]],  # 123 234
        [[1, 2, 3], [9, 8, 7]],  # 123 987
        [[5, 5, 5, 5, 5]],  # 555
    ]
    # (group, trigram) pairs: 123 234 | 123 987 | 555 -> 123 is shared: 2 of 5.
    assert shared_ngram_share(groups, 3) == 0.4
    assert shared_ngram_share(groups, 3, min_groups=3) == 0.0


def test_statistics_of_nothing_are_nan():
    for value in (distinct_n([[1]]), max_token_share([[]]), repeated_ngram_share([[1, 2]]), mean_length([])):
        assert math.isnan(value)
    assert math.isnan(shared_ngram_share([[[1, 2]], []]))


def group(number, *rollouts):
    sample = Sample(number, 0, np.array([1, 2]), np.array([3, 4]))
    suffix = Candidate(CandidateKind.SUFFIX, np.array([3, 3, 3, 3, 3, 3]))
    candidates = [
        Candidate(CandidateKind.ROLLOUT, np.array(tokens), index, np.array(log_probs, dtype=np.float32))
        for index, (tokens, log_probs) in enumerate(rollouts)
    ]
    return CandidateGroup(sample, (suffix, *candidates))


def test_health_is_measured_on_rollouts_alone():
    groups = [group(0, ([1, 2], [-1.0, -3.0])), group(1, ([5, 6, 7, 8], [-2.0, -2.0, -2.0, -2.0]))]
    health = measure_health(groups, max_length=6, kl_to_reference=0.5)
    assert health.length == 3.0
    assert health.length_share == 0.5
    assert health.entropy == pytest.approx(2.0)
    assert health.max_token_share == pytest.approx(1 / 6)
    assert health.scalars()["policy/kl_to_reference"] == 0.5


def test_healthy_rollouts_raise_no_alarm_and_neither_does_what_was_not_measured():
    limits = ObservabilityConfig()
    assert exceeded(PolicyHealth(), limits) == []
    healthy = measure_tokens([[list(range(20))], [list(range(30, 50))]], 20, entropy=3.0, kl_to_reference=0.1)
    assert exceeded(healthy, limits) == []


def test_one_token_over_and_over_raises_the_alarms_of_a_hacked_judge():
    collapsed = measure_tokens([[[7] * 20], [[7] * 20]], 20, entropy=0.01, kl_to_reference=6.0)
    assert {alarm.name for alarm in exceeded(collapsed, ObservabilityConfig())} == {
        "rollout/distinct_2",
        "policy/entropy",
        "rollout/repetition",
        "rollout/max_token_share",
        "rollout/shared_trigrams",
        "policy/kl_to_reference",
    }


def test_empty_answers_raise_the_length_alarm():
    short = measure_tokens([[[7]], [[7]]], 20)
    assert "rollout/length" in {alarm.name for alarm in exceeded(short, ObservabilityConfig())}


def test_an_alarm_is_passed_on_when_it_begins_and_then_every_interval():
    bell = AlarmBell(replace(ObservabilityConfig(), alarm_interval=10))
    bad = PolicyHealth(entropy=0.5)
    rung = [step for step in range(1, 31) if bell.check(step, bad)]
    assert rung == [1, 11, 21]
    assert "0.5 < 1" in bell.check(31, bad)[0].message


def test_the_bell_goes_on_from_a_checkpoint():
    limits = replace(ObservabilityConfig(), alarm_interval=10)
    bell = AlarmBell(limits)
    bell.check(5, PolicyHealth(entropy=0.5))
    resumed = AlarmBell(limits)
    resumed.load_state_dict(bell.state_dict())
    assert resumed.check(6, PolicyHealth(entropy=0.5)) == []
    assert len(resumed.check(6, PolicyHealth(kl_to_reference=5.0))) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("log_interval", 0, "--log-interval 0 must be at least 1"),
        ("log_samples", -1, "--log-samples -1 must not be negative"),
        ("peak_tflops", 0.0, "--peak-tflops 0.0 must be positive"),
        ("alarm_max_token_share", 25.0, "--alarm-max-token-share 25.0 is a part of the whole"),
        ("alarm_max_kl", -1.0, "--alarm-max-kl -1.0 must not be negative"),
    ],
)
def test_impossible_options_are_refused_with_value_and_remedy(name, value, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(ObservabilityConfig(), **{name: value}).validate()
    ObservabilityConfig().validate()
