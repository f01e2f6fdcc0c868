"""Covers replay question by question: failures in their order, what a ledger lacks, judges that it does not know.

Whole runs are in tests/train/test_replay.py.
"""

import asyncio
import math

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError, JudgeError
from megatron_sip.teacher import TeacherConfig
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.interfaces import JudgeIdentity, JudgeRequest, Verdict
from megatron_sip.teacher.ledger import Archive, Asked, Context, Ledger
from megatron_sip.teacher.panel import Panel
from megatron_sip.teacher.quality import RECIPES
from megatron_sip.teacher.replay import Replay, ReplayedQualityJudge
from megatron_sip.teacher.rewriter import CopyRewriter
from megatron_sip.teacher.sources import Recording
from tests.teacher.http.server import FaultServer
from tests.teacher.http.test_judges import QUICK, group
from tests.teacher.test_panel import ByValue, make_group, settings

HTTP = {"teacher": "http", "judge_served_model": "m", "pair_order": "fixed", "judge_parse_attempts": 1, **QUICK}


def judge(*requests, **changes):
    """Results of requests to one panel, one after another."""

    async def run():
        panel = build_teacher(TeacherConfig(**{**HTTP, **changes}), rewriting=False)
        try:
            return [await panel.judge(JudgeRequest(groups)) for groups in requests]
        finally:
            await panel.aclose()

    return asyncio.run(run())


@pytest.fixture
def recorded(tmp_path):
    """Pair ("1", "2") asked three times in a run: missing, missing, then won by the second."""
    path = str(tmp_path / "ledger.sqlite")
    with FaultServer(["null", "refusal"], answer=lambda body, index: "Conclusion: Option 2") as server:
        results = judge(*[(group("1", "2"),)] * 4, judge_endpoints=(server.url,), judge_ledger=path)
    assert [list(r.failures) for r in results] == [["unparsable"], ["refused"], [], []] and len(server.seen) == 3
    return path


def test_failures_come_back_in_their_order_and_the_answer_stays(recorded):
    results = judge(*[(group("1", "2"),)] * 5, replay_judgments=recorded)
    assert [r.failures for r in results] == [{"unparsable": 1}, {"refused": 1}, {}, {}, {}]
    assert all(np.isnan(r.groups[0].scores).all() for r in results[:2])
    assert all(r.groups[0].scores.tolist() == [0.0, 1.0] for r in results[2:])
    assert [r.groups[0].num_failures for r in results] == [1, 1, 0, 0, 0] and results[0].remote == {}
    # As in the recorded run: three calls, then the ledger's answer.
    assert [(r.groups[0].num_calls, r.num_cached) for r in results] == [(1, 0)] * 3 + [(0, 1)] * 2


def test_failures_count_in_the_step_and_the_group_that_met_them(tmp_path):
    """So a replay may begin at any checkpoint: step 3 failed twice and step 5 once before it was answered."""
    path = tmp_path / "ledger.sqlite"
    ledger, (key, votes) = Ledger(path), (Asked(b"p" * 16, 0), ["first", "second", "third"])
    for step, sample, failure in ((3, 1, votes[0]), (3, 1, votes[1]), (5, 1, votes[2]), (5, 8, "")):
        verdict = Verdict(math.nan if failure else 1.0, failure=failure)
        context = Context(sample, step, group("1", "2", sample_id=sample))
        ledger.add("quality", JudgeIdentity("j", "m", ""), context, [(key, (0, 1), verdict)])
    assert ledger.count() == 4
    recorded = Archive(path).find("quality", JudgeIdentity("j", "m", ""), [key])[key]

    def met(replay, step, sample):
        verdict = replay.next_of("quality", key, recorded, step, sample)
        return verdict and (verdict.failure or verdict.score)

    straight = Replay(Archive(path))
    assert [met(straight, *where) for where in ((3, 1), (3, 1), (5, 1), (5, 8), (5, 1), (9, 4))] == [
        *votes,
        1.0,
        1.0,
        1.0,
    ]
    resumed = Replay(Archive(path))
    assert [met(resumed, *where) for where in ((5, 1), (5, 8))] == ["third", 1.0]
    unanswered = [entry for entry in recorded if entry.verdict.failure]
    assert Replay(Archive(path)).next_of("quality", key, unanswered, 6, 1) is None


def test_a_question_that_was_not_recorded_is_named_with_the_remedy(recorded):
    with pytest.raises(
        JudgeError, match=r"lacks quality of sample 7, candidate 0 and 1, vote 0: this run asks what"
    ) as e:
        judge((group("1", "3", sample_id=7),), replay_judgments=recorded)
    assert "seed" in str(e.value) and "leave out --replay-judgments" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(JudgeError, match="candidate 0 and 1, vote 1: this run asks"):
        judge((group("1", "2"),), judge_votes=2, replay_judgments=recorded)


def test_a_judge_that_was_not_recorded_is_named_with_those_that_were(recorded):
    with pytest.raises(JudgeError, match=r"knows no http-quality, model large .*, but http-quality, model m "):
        judge((group("1", "2"),), judge_served_model="large", replay_judgments=recorded)
    with pytest.raises(ConfigurationError, match=r"knows no embedded quality judge with these quality settings"):
        judge((group("1", "2"),), teacher="embedded", replay_judgments=recorded)


def test_nothing_is_missing_for_a_replay_but_the_served_name():
    chosen = TeacherConfig(teacher="http")
    assert [line.split(":")[0] for line in chosen.missing_http({"quality": 1}, replaying=True)] == [
        "--judge-served-model"
    ]


def test_equal_questions_of_a_group_share_their_verdict_also_in_replay(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    group_of_twins = make_group(5, 5, 8)
    draws = iter([1.0, math.nan, 0.0])
    judge_of_draws = ByValue(lambda first, second, vote: next(draws))
    run = Panel(judge_of_draws, [], CopyRewriter(), settings(), Recording(ledger))
    before = asyncio.run(run.judge(JudgeRequest((group_of_twins,))))
    # 5 against 5, then 5 against 8, which is two pairs of the group.
    assert len(judge_of_draws.asked) == 2 and before.num_cached == 1
    again = Panel(ByValue(), [], CopyRewriter(), settings(), Replay(Archive(tmp_path / "ledger.sqlite")))
    after = asyncio.run(again.judge(JudgeRequest((group_of_twins,))))
    np.testing.assert_array_equal(after.groups[0].scores, before.groups[0].scores)
    assert after.groups[0].num_failures == before.groups[0].num_failures == 1


def test_of_several_embedded_judges_the_model_tells_which(tmp_path):
    class Named(ByValue):
        def __init__(self, model):
            super().__init__()
            self._model = model

        def identity(self):
            return JudgeIdentity("ngram-3", self._model, "")

    recipe = RECIPES["half"]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for model in ("aaaa", "bbbb"):
        panel = Panel(Named(model + recipe.fingerprint()), [], CopyRewriter(), settings(), Recording(ledger))
        asyncio.run(panel.judge(JudgeRequest((make_group(5, 8),))))
    archive = Archive(tmp_path / "ledger.sqlite")
    with pytest.raises(
        ConfigurationError, match=r"several embedded quality judges .*aaaa.*bbbb.*: give the recorded run's"
    ):
        ReplayedQualityJudge(archive, recipe)
    assert ReplayedQualityJudge(archive, recipe, "bbbb").identity().model == "bbbb" + recipe.fingerprint()
