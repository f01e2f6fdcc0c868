"""Covers judges and rewriter against a real vLLM server with a random model: what its API takes, and what it says.

The model's words mean nothing; with structured output its verdicts are well formed, without it none is. Does not cover
speed, nor a model that reasons.
"""

import asyncio

import numpy as np
import pytest

from megatron_sip.teacher import JudgeRequest, RewriteRequest, TeacherConfig
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.http.client import ChatClient
from megatron_sip.teacher.interfaces import JudgeGroup, Passage, RewriteItem

NONE = np.zeros(0, dtype=np.int64)
PREFIX = "A run starts with torchrun, one process per device. " * 12


def passage(text):
    return Passage(NONE, text)


def group(*texts, prefix=PREFIX, sample_id=0):
    kinds = ("suffix", *["rollout"] * (len(texts) - 1))
    return JudgeGroup(
        sample_id, passage(prefix), passage("The judge works meanwhile."), tuple(map(passage, texts)), kinds
    )


def config(vllm, **changes):
    values = {
        "teacher": "http", "judge_endpoints": (vllm.url,), "judge_served_model": "tiny", "judge_max_tokens": 24,
        "judge_structured_output": True, "judge_parse_attempts": 1, "pair_order": "fixed", **changes,
    }  # fmt: skip
    chosen = TeacherConfig(**values)
    chosen.validate()
    return chosen


def judge(chosen, *groups):
    async def run():
        panel = build_teacher(chosen, rewriting=False)
        try:
            return await panel.judge(JudgeRequest(groups))
        finally:
            await panel.aclose()

    return asyncio.run(run())


def test_votes_come_by_n_in_one_request_and_their_form_is_forced(vllm):
    result = judge(config(vllm, judge_votes=16), group("It goes on.", "It ends.", "It waits."))
    verdict = result.groups[0]
    assert (verdict.num_calls, verdict.num_failures, result.remote["requests"]) == (48, 0, 3)
    assert np.isfinite(verdict.scores).all() and verdict.scores.sum() == pytest.approx(1.5)


def test_every_criterion_is_answered_in_its_form(vllm):
    weights = {"judge_safety_weight": 1.0, "judge_coherence_weight": 1.0}
    verdict = judge(config(vllm, judge_votes=4, **weights), group("It goes on.", "It ends.")).groups[0]
    assert set(verdict.criteria) == {"quality", "safety", "coherence"} and verdict.num_failures == 0
    assert all(np.isfinite(scores).all() for scores in verdict.criteria.values())


def test_a_json_schema_is_taken_and_a_cut_answer_is_missing(vllm):
    weights = {"judge_quality_weight": 0.0, "judge_factuality_weight": 1.0, "judge_max_tokens": 64}
    result = judge(config(vllm, judge_votes=4, **weights), group("It goes on.", "It ends."))
    # A random model rarely finds the end of its reasoning.
    assert set(result.failures) <= {"unparsable"} and result.groups[0].num_calls == 8
    assert result.remote["answered"] == 2


def test_words_without_a_verdict_are_missing_and_never_a_score(vllm):
    result = judge(config(vllm, judge_structured_output=False, judge_votes=3), group("It goes on.", "It ends."))
    assert np.isnan(result.groups[0].scores).all() and result.failures == {"unparsable": 3}


def test_at_temperature_zero_votes_are_single_requests_that_agree(vllm):
    result = judge(config(vllm, judge_votes=3, judge_temperature=0.0), group("It goes on.", "It ends."))
    assert result.remote["requests"] == 3 and set(result.groups[0].scores) == {0.0, 1.0}


def test_a_prompt_that_is_too_long_and_an_unknown_model_are_told_apart(vllm):
    long = judge(config(vllm), group("It goes on.", "It ends.", prefix=PREFIX * 20))
    assert long.failures == {"too_long": 1} and long.remote["attempts"] == 1
    unknown = judge(config(vllm, judge_served_model="large"), group("It goes on.", "It ends."))
    assert unknown.failures == {"rejected": 1} and unknown.remote["attempts"] == 1


def test_the_prefix_comes_from_the_servers_cache_the_second_time(vllm):
    fresh = "Something that no other test has asked about, said at length. " * 12
    before = vllm.metric("vllm:prefix_cache_hits_total")
    judge(config(vllm, judge_max_in_flight=1), group("It goes on.", "It ends.", "It waits.", prefix=fresh))
    assert vllm.metric("vllm:prefix_cache_hits_total") - before >= 2 * 128


def test_arguments_of_the_chat_template_reach_it(vllm):
    def prompt_tokens(**changes):
        before = vllm.metric("vllm:prompt_tokens_total")
        judge(config(vllm, **changes), group("It goes on.", "It ends."))
        return vllm.metric("vllm:prompt_tokens_total") - before

    assert prompt_tokens(judge_chat_template_kwargs={"banner": "17 18 19 20"}) > prompt_tokens()


def test_the_rewriter_goes_on_from_the_prefixs_last_words(vllm, monkeypatch):
    replies = []
    complete = ChatClient.complete

    async def seen(self, body):
        replies.append((body(), await complete(self, body)))
        return replies[-1][1]

    monkeypatch.setattr(ChatClient, "complete", seen)

    async def run():
        panel = build_teacher(config(vllm, judge_settings={"rewriter.max_tokens": 16}), judging=False)
        item = RewriteItem(0, passage("It was a dark night and the rain"), passage(" fel in torents."))
        try:
            return (await panel.rewrite(RewriteRequest((item,)))).rewrites[0]
        finally:
            await panel.aclose()

    rewrite = asyncio.run(run())
    (body, reply), *_ = replies
    assert body["continue_final_message"] and body["messages"][-1]["content"] == "dark night and the rain"
    assert rewrite.text == reply.choices[0].text and not rewrite.copied


def test_a_recorded_run_is_repeated_without_the_server(vllm, tmp_path):
    ledger = str(tmp_path / "ledger.sqlite")
    groups = [group("It goes on.", "It ends.", "It waits.", sample_id=i, prefix=PREFIX + str(i)) for i in range(4)]
    judged = judge(config(vllm, judge_votes=9, judge_ledger=ledger), *groups)
    before = vllm.metric("vllm:prompt_tokens_total")
    replayed = judge(config(vllm, judge_votes=9, judge_endpoints=(), replay_judgments=ledger), *groups)
    assert vllm.metric("vllm:prompt_tokens_total") == before
    for one, other in zip(judged.groups, replayed.groups, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
