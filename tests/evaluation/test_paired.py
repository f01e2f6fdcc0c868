"""Pairs are judged fairly: same prefixes, same random numbers, no favoured place, missing verdicts kept missing."""

import numpy as np
import pytest

from megatron_sip.evaluation import Decoding, continue_prefixes, judge_pairs, measure_guards
from megatron_sip.types import Candidate, CandidateKind, Judgment, Sample

SAMPLES = [Sample(number, 0, np.array([number, 1]), np.array([2, 3])) for number in range(4)]


def rollout(*tokens):
    return Candidate(CandidateKind.ROLLOUT, np.array(tokens))


def by_first_token(groups):
    """A judge that scores a candidate by its first token; 0 means no verdict."""
    judgments = []
    for group in groups:
        scores = np.array([float(c.tokens[0]) if c.tokens[0] else np.nan for c in group.candidates])
        judgments.append(Judgment(scores, {"quality": scores, "safety": np.ones(len(scores))}))
    return judgments


class RecordingEngine:
    """Answers with the sample id and keeps what it was asked."""

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return [[rollout(request.sample_id)] * request.num_rollouts for request in requests]


def test_the_better_policy_wins_in_either_place():
    policy = [[rollout(9)], [rollout(9)], [rollout(1)], [rollout(5)]]
    baseline = [[rollout(2)], [rollout(2)], [rollout(2)], [rollout(5)]]
    verdicts = judge_pairs(by_first_token, SAMPLES, policy, baseline)
    assert verdicts.outcomes.tolist() == [[1.0], [1.0], [0.0], [0.5]]
    assert verdicts.criterion_means() == {"quality": (6.0, 2.75), "safety": (1.0, 1.0)}


def test_a_judge_that_prefers_the_first_place_sees_equal_policies():
    def first_place(groups):
        return [Judgment(np.array([1.0, 0.0]), {}) for _ in groups]

    pairs = [[rollout(1)] * 2 for _ in SAMPLES]
    verdicts = judge_pairs(first_place, SAMPLES, pairs, pairs)
    assert verdicts.outcomes.shape == (4, 2)
    assert verdicts.outcomes.mean() == 0.5


def test_a_missing_verdict_stays_missing():
    policy = [[rollout(0)], [rollout(7)], [rollout(7)], [rollout(7)]]
    baseline = [[rollout(2)]] * 4
    verdicts = judge_pairs(by_first_token, SAMPLES, policy, baseline)
    assert np.isnan(verdicts.outcomes[0, 0])
    assert verdicts.outcomes[1:].tolist() == [[1.0]] * 3
    assert verdicts.criterion_means()["quality"] == (7.0, 2.0)


def test_a_share_without_prefixes_is_judged_without_asking():
    verdicts = judge_pairs(lambda groups: pytest.fail("was asked"), [], [], [])
    assert verdicts.outcomes.shape == (0, 0)


def test_two_policies_are_asked_for_the_same_prefixes_with_the_same_random_numbers():
    first, second = RecordingEngine(), RecordingEngine()
    decoding = Decoding(temperature=0.8, max_new_tokens=32, seed=5, num_seeds=3)
    assert [len(row) for row in continue_prefixes(first, SAMPLES, decoding)] == [3] * 4
    continue_prefixes(second, SAMPLES, decoding)
    for ours, theirs in zip(first.requests, second.requests, strict=True):
        assert ours.seed_key == theirs.seed_key and ours.sample_id == theirs.sample_id
        assert ours.sampling.temperature == 0.8 and not ours.greedy
        assert ours.prefix.tolist() == theirs.prefix.tolist()


def test_greedy_decoding_has_one_continuation_however_many_seeds():
    engine = RecordingEngine()
    decoding = Decoding(temperature=0.0, max_new_tokens=32, seed=5, num_seeds=3)
    assert decoding.name == "greedy"
    assert [len(row) for row in continue_prefixes(engine, SAMPLES, decoding)] == [1] * 4
    assert all(request.greedy for request in engine.requests)


def test_guards_by_hand():
    guards = measure_guards([[1, 2, 3, 4], [1, 2, 3, 1, 2, 3]])
    assert guards.num_continuations == 2
    assert guards.length == 5.0
    # Bigrams 12 23 34 | 12 23 31 12 23: 4 distinct of 8.
    assert guards.distinct_2 == 0.5
    # Tokens 1, 2 and 3 occur 3 times each in 10.
    assert guards.max_token_share == 0.3
    # Trigrams 123 234 | 123 231 312 123: one of six repeats within its continuation.
    assert guards.repeated_trigrams == pytest.approx(1 / 6)
    # Per prefix {123 234} and {123 231 312}: 123 is in both, 2 of 5.
    assert guards.boilerplate == 0.4
    assert guards.violations() == ["one token 30.0% > 25%", "repeated trigrams 16.7% > 15%"]


def test_a_collapsed_policy_breaks_every_guard_and_varied_text_none():
    assert len(measure_guards([[7] * 32] * 10).violations()) == 3
    assert measure_guards([list(range(32 * i, 32 * i + 32)) for i in range(10)]).violations() == []
