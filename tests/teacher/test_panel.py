"""Covers how questions are asked, put together and kept, with judges whose every verdict is known."""

import asyncio
import math

import numpy as np
import pytest

from megatron_sip.teacher.interfaces import (
    JudgeGroup,
    JudgeIdentity,
    JudgeRequest,
    Passage,
    Verdict,
    passages_hash,
)
from megatron_sip.teacher.ledger import Ledger
from megatron_sip.teacher.panel import Panel, PanelSettings
from megatron_sip.teacher.rewriter import CopyRewriter
from megatron_sip.teacher.schedule import num_comparisons
from megatron_sip.teacher.sources import Recording

NAN = math.nan
WEIGHTS = {"quality": 1.0, "safety": 2.0, "factuality": 0.0}


class ByValue:
    """Pairwise: the candidate with the larger first token wins. Remembers what it was asked."""

    criterion = "quality"

    def __init__(self, answer=None):
        self.asked = []
        self._answer = answer or (lambda first, second, vote: float(first > second))

    def identity(self):
        return JudgeIdentity("by-value", "1", "")

    def prompt_hash(self, question):
        return passages_hash([question.group.candidates[i] for i in question.options])

    async def ask(self, questions):
        self.asked += [(question.options, question.vote) for question in questions]
        verdicts = []
        for question in questions:
            first, second = (int(question.group.candidates[i].tokens[0]) for i in question.options)
            score = self._answer(first, second, question.vote)
            verdicts.append(Verdict(score, failure="unparsable" if math.isnan(score) else "", latency_s=0.5))
        return verdicts


class Even:
    """Pointwise: 1 for an even first token; nothing for those in ``missing``."""

    criterion = "safety"

    def __init__(self, missing=()):
        self._missing = missing

    def identity(self):
        return JudgeIdentity("even", "1", "")

    def prompt_hash(self, question):
        return passages_hash([question.group.candidates[question.options[0]]])

    async def ask(self, questions):
        tokens = [int(question.group.candidates[question.options[0]].tokens[0]) for question in questions]
        return [Verdict(NAN, failure="refused") if t in self._missing else Verdict(float(t % 2 == 0)) for t in tokens]


def make_group(*values, sample_id=0):
    def passage(value):
        return Passage(np.array([value]), str(value))

    kinds = ("suffix",) + ("rollout",) * (len(values) - 1)
    return JudgeGroup(sample_id, passage(0), passage(0), tuple(map(passage, values)), kinds)


def settings(**changes):
    defaults = {
        "weights": WEIGHTS, "pair_schedule": "all", "pair_pivot": "suffix", "pair_order": "fixed", "votes": 1,
    }  # fmt: skip
    return PanelSettings(**{**defaults, **changes})


def judge(panel, *groups):
    return asyncio.run(panel.judge(JudgeRequest(tuple(groups))))


def test_the_total_is_the_weighted_sum_of_criteria():
    result = judge(Panel(ByValue(), [Even()], CopyRewriter(), settings()), make_group(5, 8, 2))
    (verdict,) = result.groups
    assert verdict.criteria["quality"].tolist() == [0.5, 1.0, 0.0]
    assert verdict.criteria["safety"].tolist() == [0, 1, 1]
    assert verdict.scores.tolist() == [0.5, 3.0, 2.0]
    assert (verdict.num_calls, verdict.num_failures, verdict.num_comparisons) == (6, 0, 3)
    assert len(result.latencies_s) == 6


def test_a_missing_safety_verdict_makes_the_total_missing_and_not_unsafe():
    (verdict,) = judge(Panel(ByValue(), [Even(missing=(8,))], CopyRewriter(), settings()), make_group(5, 8, 2)).groups
    assert np.isnan(verdict.scores[1])
    assert verdict.scores[[0, 2]].tolist() == [0.5, 2.0]
    assert verdict.criteria["quality"].tolist() == [0.5, 1.0, 0.0]
    assert verdict.num_failures == 1


def test_votes_are_averaged_and_missing_ones_left_out():
    # Votes 0 and 1 agree with the values, vote 2 is lost, vote 3 says the opposite.
    quality = ByValue(lambda first, second, vote: NAN if vote == 2 else float((first > second) == (vote < 2)))
    (verdict,) = judge(Panel(quality, [], CopyRewriter(), settings(votes=4)), make_group(5, 8)).groups
    assert verdict.criteria["quality"] == pytest.approx([1 / 3, 2 / 3])
    assert (verdict.num_calls, verdict.num_failures, verdict.num_comparisons) == (4, 1, 1)


def test_both_orders_make_disagreement_a_half_and_count_it():
    # Always the option shown first, except between 8 and 2.
    biased = ByValue(lambda first, second, vote: float(first > second) if {first, second} == {8, 2} else 1.0)
    result = judge(Panel(biased, [], CopyRewriter(), settings(pair_order="both")), make_group(5, 8, 2))
    assert result.groups[0].criteria["quality"].tolist() == [0.5, 0.75, 0.25]
    assert (result.num_both_orders, result.num_flips) == (3, 2)
    assert biased.asked == [((0, 1), 0), ((1, 0), 0), ((0, 2), 0), ((2, 0), 0), ((1, 2), 0), ((2, 1), 0)]


def test_random_order_is_fair_and_the_same_in_every_batch_and_changes_no_verdict():
    quality = ByValue()
    panel = Panel(quality, [], CopyRewriter(), settings(pair_order="random"))
    groups = [make_group(5, 8, sample_id=i) for i in range(400)]
    together = judge(panel, *groups)
    assert all(verdict.criteria["quality"].tolist() == [0.0, 1.0] for verdict in together.groups)
    swapped = [options == (1, 0) for options, _ in quality.asked]
    # 400 fair draws: standard deviation 10.
    assert 150 < sum(swapped) < 250
    quality.asked.clear()
    for group in groups[:40]:
        judge(panel, group)
    assert [options == (1, 0) for options, _ in quality.asked] == swapped[:40]
    other = ByValue()
    judge(Panel(other, [], CopyRewriter(), settings(pair_order="random", seed=1)), *groups)
    changed = sum(options == (1, 0) for options, _ in other.asked) - sum(swapped)
    assert [options == (1, 0) for options, _ in other.asked] != swapped and abs(changed) < 100


def test_a_judge_that_says_first_every_time_gains_nothing_from_random_order():
    panel = Panel(ByValue(lambda f, s, v: 1.0), [], CopyRewriter(), settings(pair_order="random", votes=200))
    quality = judge(panel, make_group(5, 8)).groups[0].criteria["quality"]
    # 200 fair draws: standard deviation 0.035.
    assert quality == pytest.approx([0.5, 0.5], abs=0.14)


def test_the_ledger_answers_repeated_questions_vote_by_vote(tmp_path):
    first, second = ByValue(), ByValue()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    before = judge(Panel(first, [Even()], CopyRewriter(), settings(votes=3), Recording(ledger)), make_group(5, 8, 2))
    assert (before.num_cached, ledger.count()) == (0, 3 * 3 + 3 * 3)
    after = judge(Panel(second, [Even()], CopyRewriter(), settings(votes=5), Recording(ledger)), make_group(5, 8, 2))
    assert after.groups[0].scores.tolist() == before.groups[0].scores.tolist()
    assert after.num_cached == 18
    assert [vote for _, vote in second.asked] == [3, 4] * 3
    assert after.groups[0].num_calls == 2 * (3 + 3)


def test_a_lost_verdict_is_asked_again_and_never_taken_from_the_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    lost = judge(
        Panel(ByValue(lambda f, s, v: NAN), [], CopyRewriter(), settings(), Recording(ledger)), make_group(5, 8)
    )
    assert np.isnan(lost.groups[0].scores).all()
    found = judge(Panel(ByValue(), [], CopyRewriter(), settings(), Recording(ledger)), make_group(5, 8))
    assert found.groups[0].scores.tolist() == [0.0, 1.0]
    assert found.num_cached == 0


class Running(ByValue):
    """Its verdicts depend on how many requests it has observed."""

    def __init__(self):
        self.observed = 0
        super().__init__(lambda first, second, vote: float(self.observed % 2))

    async def ask(self, questions):
        before = self.observed
        await asyncio.sleep(0.01)
        assert self.observed == before, "another request came in between"
        return await super().ask(questions)

    def observe(self, groups):
        self.observed += 1

    def state_dict(self):
        return {"observed": self.observed}

    def load_state_dict(self, state):
        self.observed = state["observed"]


def test_requests_reach_a_running_judge_one_after_another_in_order():
    running = Running()
    panel = Panel(running, [], CopyRewriter(), settings())

    async def together():
        requests = [JudgeRequest((make_group(5, 8), make_group(1, 2)), learn=i != 2) for i in range(5)]
        return await asyncio.gather(*(panel.judge(request) for request in requests))

    results = asyncio.run(together())
    # Observed before judging: 1, 2, then not, 3, 4.
    assert [r.groups[0].scores[0] for r in results] == [1, 0, 0, 1, 0]
    other = Panel(Running(), [], CopyRewriter(), settings())
    other.load_state_dict(panel.state_dict())
    assert other.state_dict() == {"quality": {"observed": 4}}


def test_quality_and_coherence_are_both_searched_for_the_ends_of_their_total():
    class ByParity(ByValue):
        """Even values are more coherent than odd ones; among equals it is a tie."""

        criterion = "coherence"

        def __init__(self):
            super().__init__(lambda first, second, vote: 0.5 + (second % 2 - first % 2) / 2)

    values = [7, 2, 9, 4, 16, 11, 5, 0, 13, 3, 8, 1]
    weights = {"quality": 1.0, "coherence": 4.0}
    chosen = settings(weights=weights, pair_schedule="best_worst")
    quality, coherence = ByValue(), ByParity()
    (verdict,) = judge(Panel(quality, [], CopyRewriter(), chosen, coherence=coherence), make_group(*values)).groups
    budget = num_comparisons("best_worst", len(values))
    assert len(quality.asked) <= budget and len(coherence.asked) <= budget
    assert verdict.num_comparisons == len(quality.asked) + len(coherence.asked) < 2 * 12 * 11 / 2
    np.testing.assert_allclose(
        verdict.scores, verdict.criteria["quality"] + 4 * verdict.criteria["coherence"], equal_nan=True
    )
    best, worst = values[int(np.nanargmax(verdict.scores))], values[int(np.nanargmin(verdict.scores))]
    assert best in (16, 8) and worst in (1, 3), "coherence decides, quality breaks its ties"


@pytest.mark.parametrize(("schedule", "together"), [("all", True), ("circular", True), ("best_worst", False)])
def test_questions_of_all_criteria_are_asked_at_once_unless_pairs_follow_the_other_scores(schedule, together):
    order = []

    class Noting(ByValue):
        async def ask(self, questions):
            order.append("quality")
            return await super().ask(questions)

    class Slow(Even):
        async def ask(self, questions):
            order.append("safety")
            await asyncio.sleep(0.05)
            order.append("safe")
            return await super().ask(questions)

    judge(Panel(Noting(), [Slow()], CopyRewriter(), settings(pair_schedule=schedule)), make_group(5, 8, 2))
    assert order.index("safety") == 0
    assert (order.index("quality") < order.index("safe")) == together
