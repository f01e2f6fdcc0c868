"""The comparison as a whole, on fake policies and judges."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.evaluation import Decoding, EvaluationConfig, evaluate, generate_all, judge_pairs, render_table
from megatron_sip.types import Candidate, CandidateKind, Judgment, Sample

SAMPLES = [Sample(number, 0, np.array([number, 1]), np.arange(100 * number, 100 * number + 8)) for number in range(10)]
DECODINGS = [Decoding(1.0, 8, seed=1, num_seeds=2), Decoding(0.0, 8, seed=1, num_seeds=2)]


class FakeEngine:
    """Writes eight different tokens, or one eight times."""

    def __init__(self, collapsed):
        self.collapsed = collapsed

    def generate(self, requests):
        return [
            [self._rollout(request.sample_id, number) for number in range(request.num_rollouts)] for request in requests
        ]

    def _rollout(self, sample_id, number):
        start = 1000 * sample_id + 100 * number
        tokens = [7] * 8 if self.collapsed else range(start, start + 8)
        return Candidate(CandidateKind.ROLLOUT, np.array(tokens), number)


class Alone:
    """One replica."""

    def gather_over_data_parallel(self, obj):
        return [obj]


class Twice:
    """Two replicas with equal samples."""

    def gather_over_data_parallel(self, obj):
        return [obj, obj]


def likes_variety(groups):
    scores = [np.array([float(len(set(c.tokens.tolist()))) for c in group.candidates]) for group in groups]
    return [Judgment(values, {"quality": values}) for values in scores]


def likes_nothing(groups):
    return [Judgment(np.full(2, np.nan), {}) for _ in groups]


def compared(replicas):
    policy = generate_all(FakeEngine(collapsed=False), SAMPLES, DECODINGS)
    baseline = generate_all(FakeEngine(collapsed=True), SAMPLES, DECODINGS)
    judges = {"first": likes_variety, "second": likes_nothing}
    return evaluate(SAMPLES, policy, baseline, judges, replicas)


def test_every_decoding_is_judged_by_every_judge():
    result = compared(Alone())
    found = {(item.decoding, item.judge): item.win_rate for item in result.comparisons}
    assert set(found) == {(d, j) for d in ("T=1", "greedy") for j in ("first", "second")}
    assert found["T=1", "first"].rate == 1.0
    # Two seeds at T = 1, one when greedy; the second judge gave no verdict at all.
    assert (found["T=1", "first"].wins, found["greedy", "first"].wins) == (20, 10)
    assert found["T=1", "second"].missing == 20 and np.isnan(found["T=1", "second"].rate)
    assert result.comparisons[0].criteria == {"quality": (8.0, 1.0)}


@pytest.mark.parametrize(("cut", "outcome", "scores"), [(False, 1.0, (8.0, 5.0)), (True, 0.5, (5.0, 5.0))])
def test_cut_to_the_shorter_of_a_pair_its_length_gains_nothing(cut, outcome, scores):
    class Shorter(FakeEngine):
        def _rollout(self, sample_id, number):
            candidate = super()._rollout(sample_id, number)
            return replace(candidate, tokens=candidate.tokens[:5], sampling_log_probs=np.zeros(5))

    def likes_length(groups):
        return [
            Judgment(values := np.array([float(len(c.tokens)) for c in g.candidates]), {"n": values}) for g in groups
        ]

    policy = generate_all(FakeEngine(collapsed=False), SAMPLES, DECODINGS)
    baseline = generate_all(Shorter(collapsed=False), SAMPLES, DECODINGS)
    result = evaluate(SAMPLES, policy, baseline, {"length": likes_length}, Alone(), cut_to_shorter=cut)
    assert [item.win_rate.rate for item in result.comparisons] == [outcome, outcome]
    assert [item.criteria["n"] for item in result.comparisons] == [scores, scores]
    assert result.guards[0].policy.length == 8.0, "the guards see all of it"


def test_guards_tell_the_policies_apart_and_are_of_one_continuation_per_prefix():
    result = compared(Alone())
    sampled = result.guards[0]
    assert sampled.decoding == "T=1"
    assert sampled.policy.num_continuations == sampled.baseline.num_continuations == 10
    assert sampled.policy.violations() == [] and len(sampled.baseline.violations()) == 3
    assert sampled.coherence.rate == 1.0
    assert result.suffix_guards.distinct_2 == 1.0


def test_replicas_are_put_together():
    result = compared(Twice())
    assert result.num_prefixes == 20
    assert result.comparisons[0].win_rate.wins == 40
    assert result.guards[0].policy.num_continuations == 20


class SecondHasNone:
    """Two replicas, the second without prefixes."""

    def gather_over_data_parallel(self, obj):
        return [obj, [] if isinstance(obj, list) else judge_pairs(likes_variety, [], [], [])]


def test_a_replica_without_prefixes_takes_part():
    policy = generate_all(FakeEngine(collapsed=False), SAMPLES, DECODINGS[:1])
    result = evaluate(SAMPLES, policy, policy, {"first": likes_variety}, SecondHasNone())
    assert result.num_prefixes == 10
    assert result.comparisons[0].win_rate.rate == 0.5


def test_the_result_is_json_and_a_table():
    result = compared(Alone())
    assert json.loads(json.dumps(result.as_dict()))["comparisons"][0]["win_rate"]["wins"] == 20
    table = render_table(result)
    assert "100.0%" in table and "distinct-2" in table and "one token 100.0% > 25%" in table


def test_progress_counts_every_prefix_of_every_decoding():
    counts = []
    generate_all(FakeEngine(collapsed=False), SAMPLES, DECODINGS, counts.append, chunk=4)
    assert counts == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prefixes": 0}, "--num-prefixes 0: must be at least 1"),
        ({"temperature": (1.0, -1.0)}, r"--temperature \(1.0, -1.0\): give one or more numbers"),
        ({"temperature": (1.0, 1.0)}, "name each one once"),
        ({"confidence": 95.0}, "--confidence 95.0: give a share between 0 and 1"),
    ],
)
def test_impossible_options_are_refused_with_value_and_remedy(changes, message):
    config = EvaluationConfig(checkpoint="a", baseline="b")
    config.validate()
    with pytest.raises(ConfigurationError, match=message):
        replace(config, **changes).validate()
