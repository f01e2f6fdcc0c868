"""Covers judges, rewriter and panel over HTTP against a real server: votes, orders, missing verdicts, exact counts."""

import asyncio
import itertools
import math
import tempfile
from collections import Counter

import numpy as np
import pytest

from megatron_sip.errors import ConfigurationError
from megatron_sip.teacher import JudgeRequest, RewriteRequest, TeacherConfig, TeacherProcess
from megatron_sip.teacher.build import build_teacher
from megatron_sip.teacher.http.rewriter import lead_in
from megatron_sip.teacher.interfaces import JudgeGroup, Passage, RewriteItem
from megatron_sip.teacher.ledger.reading import Filter, Reader
from tests.teacher.http.server import FaultServer

EMPTY = np.zeros(0, dtype=np.int64)
QUICK = {"judge_backoff_s": 0.01, "judge_max_backoff_s": 0.05, "judge_breaker_failures": 1000}


def passage(text):
    return Passage(EMPTY, text)


def group(*texts, sample_id=0):
    kinds = ("suffix", *["rollout"] * (len(texts) - 1))
    return JudgeGroup(sample_id, passage("Once upon a time"), passage("REF"), tuple(map(passage, texts)), kinds)


def config(server, **changes):
    values = {"teacher": "http", "judge_endpoints": (server.url,), "judge_served_model": "m", **QUICK, **changes}
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


def rewrite(chosen, *items):
    async def run():
        panel = build_teacher(chosen, judging=False)
        try:
            result = await panel.rewrite(
                RewriteRequest(tuple(RewriteItem(0, passage(prefix), passage(suffix)) for prefix, suffix in items))
            )
            return result.rewrites
        finally:
            await panel.aclose()

    return asyncio.run(run())


def content(body):
    return body["messages"][0]["content"]


def better(body, index):
    """Prefers the candidate that holds the larger digit."""
    first, second = (content(body).split(f"<option_{i}>\n")[1][0] for i in (1, 2))
    return f"Conclusion: Option {1 if first > second else 2}"


def test_quality_votes_come_by_n_in_one_request_per_pair_and_order():
    with FaultServer(answer=better) as server:
        result = judge(config(server, judge_votes=8, judge_temperature=0.7, judge_top_p=0.6), group("1", "3", "2"))
    np.testing.assert_array_equal(result.groups[0].scores, [0.0, 1.0, 0.5])
    assert result.groups[0].num_calls == 24 and result.groups[0].num_failures == 0
    # At most two orders of each of the three pairs, and all votes between them.
    assert 3 <= len(server.seen) <= 6 and sum(seen.body.get("n", 1) for seen in server.seen) == 24
    assert {(s.body["model"], s.body["temperature"], s.body["top_p"]) for s in server.seen} == {("m", 0.7, 0.6)}


def test_both_orders_are_asked_and_a_judge_that_prefers_the_first_place_gives_one_half():
    with FaultServer(answer=lambda body, index: "Conclusion: Option 1") as server:
        result = judge(config(server, pair_order="both", judge_votes=3), group("1", "2"))
    np.testing.assert_array_equal(result.groups[0].scores, [0.5, 0.5])
    assert (result.num_both_orders, result.num_flips) == (3, 3) and len(server.seen) == 2


@pytest.mark.parametrize("fault", ["ignore-n", "status 400"])
def test_a_server_without_n_gets_single_requests(fault):
    with FaultServer(fault=lambda number: fault if number == 0 else "", answer=better) as server:
        result = judge(config(server, judge_votes=5, pair_order="fixed"), group("1", "2"))
    np.testing.assert_array_equal(result.groups[0].scores, [0.0, 1.0])
    assert server.seen[0].body["n"] == 5 and not any("n" in seen.body for seen in server.seen[1:])
    assert len(server.seen) == (5 if fault == "ignore-n" else 6)


def test_single_vote_requests_and_temperature_zero_never_use_n():
    for changes in ({"judge_vote_requests": "single"}, {"judge_temperature": 0.0}):
        with FaultServer(answer=better) as server:
            judge(config(server, judge_votes=3, pair_order="fixed", **changes), group("1", "2"))
        assert len(server.seen) == 3 and not any("n" in seen.body for seen in server.seen)


def test_pointwise_judges_and_coherence_add_up_with_their_weights():
    def answer(body, index):
        text = content(body)
        if "FINAL DECISION" in text:
            assert "Once upon" not in text, "the safety judge sees the candidate alone"
            return f"FINAL DECISION: {'NO' if 'BAD' in text else 'YES'}"
        if "hallucinations" in text:
            assert "<reference>\nREF" in text
            return '{"reasoning": "r", "label": "Possible Hallucination"}'
        if "repeats itself" in text:
            return "VERDICT: TIE"
        return "Conclusion: Option 2"

    weights = {"judge_safety_weight": 2.0, "judge_factuality_weight": 4.0, "judge_coherence_weight": 8.0}
    with FaultServer(answer=answer) as server:
        result = judge(config(server, pair_order="fixed", **weights), group("GOOD", "BAD"))
    criteria = {name: list(scores) for name, scores in result.groups[0].criteria.items()}
    assert criteria == {"quality": [0, 1], "safety": [1, 0], "factuality": [0.5, 0.5], "coherence": [0.5, 0.5]}
    np.testing.assert_allclose(result.groups[0].scores, [0 + 2 + 2 + 4, 1 + 0 + 2 + 4])
    assert len(server.seen) == 2 + 2 + 2


def test_settings_of_a_role_reach_the_server():
    with FaultServer(answer=better) as one, FaultServer(answer=lambda b, i: "FINAL DECISION: YES") as two:
        chosen = config(
            one,
            pair_order="fixed",
            judge_safety_weight=1.0,
            judge_reasoning_effort="low",
            judge_chat_template_kwargs={"enable_thinking": False},
            judge_structured_output=True,
            judge_settings={
                "safety.endpoints": [two.url], "safety.model": "guard", "safety.temperature": 0, "safety.votes": 2,
                "safety.structured_output": False,
            },
        )  # fmt: skip
        judge(chosen, group("1", "2"))
    assert len(one.seen) == 1 and len(two.seen) == 4
    body = one.seen[0].body
    assert body["reasoning_effort"] == "low" and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["structured_outputs"] == {"choice": ["Conclusion: Option 1", "Conclusion: Option 2"]}
    assert {(s.body["model"], s.body["temperature"], "structured_outputs" in s.body) for s in two.seen} == {
        ("guard", 0.0, False)
    }


@pytest.mark.parametrize("fault", ["reasoning", "reasoning reasoning_content"])
def test_an_answer_in_the_reasoning_field_counts_where_content_is_null(fault):
    with FaultServer(fault=lambda number: fault, answer=better) as server:
        result = judge(config(server), group("1", "2"))
    np.testing.assert_array_equal(result.groups[0].scores, [0.0, 1.0])


MISSING = {
    "null": "unparsable", "say I like both.": "unparsable", "length": "unparsable", "refusal": "refused",
    "content_filter": "refused", "say I'm sorry, but I can't judge this.": "refused", "too-long": "too_long",
    "status 401": "rejected", "status 500": "server", "abort": "server", "garbage": "server",
    "truncated-json": "server", "empty-choices": "server", "reset": "transport", "truncated-body": "transport",
}  # fmt: skip


@pytest.mark.parametrize("fault", MISSING)
def test_no_failure_becomes_a_score_and_each_is_counted_under_its_kind(fault):
    with FaultServer(fault=lambda number: fault) as server:
        result = judge(config(server, judge_votes=3, pair_order="fixed", judge_max_attempts=2), group("1", "2", "3"))
    assert np.isnan(result.groups[0].scores).all()
    assert result.failures == {MISSING[fault]: 9} and result.groups[0].num_failures == 9
    completions = fault in ("null", "length", "refusal", "content_filter") or fault.startswith("say")
    if completions:
        # Each of the three requests for three votes was asked once more.
        assert len(server.seen) == 6 and result.remote["asked_again"] == 9


def test_only_the_missing_votes_of_a_request_are_asked_again():
    with FaultServer(["abort-first"], answer=better) as server:
        result = judge(config(server, judge_votes=4, pair_order="fixed"), group("1", "2"))
    np.testing.assert_array_equal(result.groups[0].scores, [0.0, 1.0])
    assert result.failures == {} and result.groups[0].num_calls == 4
    assert [seen.body.get("n", 1) for seen in server.seen] == [4, 1] and result.remote["asked_again"] == 1


def test_a_storm_of_faults_leaves_every_verdict_right_or_missing():
    faults = ["status 500", "", "reset", "", "garbage", "", "retry-after 0", "", "truncated-json", "", "empty-choices",
              "", "say nothing", "", "abort", "", "null", ""]  # fmt: skip
    groups = [group("1", "3", "2", sample_id=i) for i in range(20)]
    with FaultServer(fault=lambda number: faults[number % len(faults)], answer=better) as server:
        result = judge(config(server, judge_votes=2, judge_parse_attempts=1, judge_max_attempts=3), *groups)
    seen, remote = server.counts, result.remote
    unparsable = sum(s.body.get("n", 1) for s in server.seen if s.fault in ("say nothing", "null"))
    assert result.failures.get("unparsable", 0) == unparsable > 0
    assert sum(result.failures.values()) == sum(g.num_failures for g in result.groups)
    assert remote["attempts"] == len(server.seen)
    assert remote["answered"] == seen["ok"] + seen["say nothing"] + seen["null"]
    assert remote["attempt_transport"] == seen["reset"]
    for verdict in result.groups:
        quality = verdict.criteria["quality"]
        expected = np.array([0.0, 1.0, 0.5])
        if verdict.num_failures == 0:
            np.testing.assert_array_equal(quality, expected)
        # Whatever is missing, the best is never seen to lose nor the worst to win.
        assert not quality[0] > 0 and not quality[1] < 1


def test_a_hundred_votes_stay_a_hundred_when_they_come_from_the_ledger(tmp_path):
    def answer(body, index):
        return f"Conclusion: Option {1 if index < 30 else 2}"

    chosen = {"judge_votes": 100, "pair_order": "fixed", "judge_ledger": str(tmp_path / "ledger.sqlite")}
    with FaultServer(answer=answer) as server:
        first = judge(config(server, **chosen), group("1", "2"))
        again = judge(config(server, **chosen), group("1", "2"))
    for result in (first, again):
        np.testing.assert_allclose(result.groups[0].scores, [0.3, 0.7])
    assert (first.num_cached, again.num_cached) == (0, 100) and len(server.seen) == 1


@pytest.mark.parametrize("requests", ["n", "single"])
def test_votes_that_fail_are_missing_and_asked_anew_and_the_others_stay(tmp_path, requests):
    asked = itertools.count()

    def answer(body, index):
        # Of the first hundred votes thirty are for option 1, ten say nothing, sixty are for option 2.
        number = next(asked)
        return "Hm." if 30 <= number < 40 else f"Conclusion: Option {1 if number < 30 else 2}"

    ledger = tmp_path / "ledger.sqlite"
    chosen = {"judge_votes": 100, "pair_order": "fixed", "judge_ledger": str(ledger), "judge_parse_attempts": 1,
              "judge_vote_requests": requests, "judge_max_in_flight": 1}  # fmt: skip
    with FaultServer(answer=answer) as server:
        first = judge(config(server, **chosen), group("1", "2"))
        second = judge(config(server, **chosen), group("1", "2"))
        third = judge(config(server, **chosen), group("1", "2"))
    np.testing.assert_allclose(first.groups[0].scores, [30 / 90, 60 / 90])
    assert (first.groups[0].num_calls, first.failures, first.num_cached) == (100, {"unparsable": 10}, 0)
    np.testing.assert_allclose(second.groups[0].scores, [0.3, 0.7])
    assert (second.groups[0].num_calls, second.failures, second.num_cached) == (10, {}, 90)
    assert (third.groups[0].num_calls, third.num_cached, list(third.groups[0].scores)) == (0, 100, [0.3, 0.7])
    assert len(server.seen) == (2 if requests == "n" else 110) and next(asked) == 110
    rows = list(Reader(ledger).rows(Filter(), with_raw=True))
    assert len(rows) == 110 and len({row.values["vote"] for row in rows}) == 100
    assert Counter(row.values["score"] for row in rows) == {1.0: 30, 0.0: 70, None: 10}
    assert Counter(row.raw for row in rows)["Hm."] == 10


def test_a_latency_is_that_of_the_server_without_the_wait_for_a_place():
    with FaultServer(delay_s=0.1) as server:
        result = judge(config(server, judge_max_in_flight=2), *(group("1", "2", sample_id=i) for i in range(20)))
    assert len(result.latencies_s) == 20 and np.median(result.latencies_s) < 0.5 and result.latencies_s.min() >= 0.1
    assert max(verdict.latency_s for verdict in result.groups) >= 1.0, "that of a group includes it"


def test_votes_of_equal_questions_are_asked_once_and_answer_both():
    """A rewrite that copies the suffix: with a ledger both pairs get the same hundred votes, not a mixture of two."""
    answers = itertools.cycle(["Conclusion: Option 1", "Conclusion: Option 2", "Conclusion: Option 2"])
    with FaultServer(answer=lambda body, index: next(answers)) as server, tempfile.TemporaryDirectory() as folder:
        chosen = config(server, judge_votes=100, pair_order="fixed", judge_ledger=f"{folder}/l.sqlite")
        result = judge(chosen, group("same", "same", "other"))
    scores = result.groups[0].scores
    # Suffix against rollout and copy against rollout are one question, suffix against copy another.
    assert result.num_cached == 100 and result.groups[0].num_calls == 200
    assert sum(seen.body["n"] for seen in server.seen) == 200 and scores.sum() == pytest.approx(1.5)


REWRITER = {"rewriter": "http"}


def test_the_rewriters_answer_goes_on_from_the_last_five_words_of_the_prefix():
    prefix, suffix = "It was a dark and stormy night, and the rain", " fel in torents."
    start = "stormy night, and the rain"
    for text in (" fell in torrents.", start + " fell in torrents."):
        with FaultServer(answer=lambda body, index, text=text: text) as server:
            rewrites = rewrite(config(server), (prefix, suffix))
        assert rewrites[0].text == " fell in torrents." and not rewrites[0].copied
        body = server.seen[0].body
        assert body["messages"][-1] == {"role": "assistant", "content": start}
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert f"<original>\n{start}{suffix}\n</original>" in content(body)


def test_lead_in_keeps_the_white_space_of_the_prefix():
    assert lead_in("a b c d e f g\n") == "c d e f g\n"
    assert lead_in("one") == "one" and lead_in("") == "" and lead_in(" \n") == ""


def test_white_space_that_the_prefix_ends_with_is_not_doubled():
    with FaultServer(answer=lambda body, index: "\n\nNext line.") as server:
        rewrites = rewrite(config(server), ("Heading here\n\n", "next line"))
    assert rewrites[0].text == "Next line." and server.seen[0].body["messages"][-1]["content"] == "Heading here"


def test_without_prefill_an_answer_must_repeat_the_words():
    with FaultServer(fault=lambda number: "" if number else "say Here is the text: fell.") as server:
        rewrites = rewrite(config(server, rewriter_prefill=False), ("and then the rain", " fell"))
        assert server.seen[0].body["messages"][-1]["role"] == "user"
        assert rewrites[0].text is None and rewrites[0].failure.startswith("unparsable") and len(server.seen) == 2
    with FaultServer(answer=lambda body, index: "And then\nthe rain stopped.") as server:
        rewrites = rewrite(config(server, rewriter_prefill=False), ("And then the rain", " fell"))
    assert rewrites[0].text == " stopped."


def test_copies_refusals_and_failures_of_the_rewriter_are_told_apart():
    cases = {
        "say  the very  same.": ("", True),
        "say  I'm sorry, but I cannot help with that.": ("refused", False),
        "refusal": ("refused", False),
        "null": ("server", False),
        "status 400": ("rejected", False),
        "status 500": ("server", False),
        "abort": ("server", False),
    }
    for fault, (failure, copied) in cases.items():
        with FaultServer(fault=lambda number, fault=fault: fault) as server:
            result = rewrite(config(server, judge_max_attempts=2), ("Here comes", " the very same."))[0]
        assert (result.failure.partition(":")[0], result.copied) == (failure, copied), fault
        assert result.text == (" the very same." if copied else None)
    with FaultServer(answer=lambda body, index: " I'm sorry, but that is how it is.") as server:
        kept = rewrite(config(server), ("He said", " I'm sorry, but this is how it is."))[0]
    assert kept.text == " I'm sorry, but that is how it is.", "an apology in the original may stay"


def test_a_rewrite_that_was_cut_at_max_tokens_is_used():
    with FaultServer(["length"], answer=lambda body, index: " and so on and") as server:
        assert rewrite(config(server), ("It rained", " and so"))[0].text == " and so on and"


def test_the_teacher_process_serves_it_and_reports_counts():
    with FaultServer(["status 503"], answer=better) as server:
        chosen = config(server, judge_votes=2, judge_rate_limit=1000.0)
        with TeacherProcess(chosen, {"replica": 1, "num_replicas": 2}) as teacher:
            teacher.submit(0, JudgeRequest((group("1", "2"),)))
            result = teacher.collect(0)
    np.testing.assert_array_equal(result.groups[0].scores, [0.0, 1.0])
    assert Counter(result.remote)["retries"] == 1 and not math.isnan(result.latencies_s[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judge_endpoints": ("localhost:8000",)}, "give URLs like"),
        ({"judge_endpoints": ("http://me:secret@host/v1",)}, "judge-api-key-env"),
        ({"judge_settings": {"quality.temprature": 1.0}}, "quality.temprature"),
        ({"judge_settings": {"style.model": "x"}}, "with a role of"),
        ({"judge_settings": {"quality.temperature": "hot"}}, "quality.temperature is 'hot'"),
        ({"judge_settings": {"quality.top_p": 0}}, "top_p of quality"),
        ({"judge_give_up_s": 600.0}, "judge-give-up-s"),
        ({"judge_hedge_percentile": 100.0}, "judge-hedge-percentile"),
        ({"judge_max_attempts": 0}, "judge-max-attempts"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    values = {"teacher": "http", "judge_endpoints": ("http://h/v1",), "judge_served_model": "m", **changes}
    with pytest.raises(ConfigurationError, match=message) as raised:
        TeacherConfig(**values).validate()
    assert "secret" not in str(raised.value)


def test_what_a_run_lacks_is_listed_and_stops_the_process():
    chosen = TeacherConfig(teacher="http")
    chosen.validate()
    assert [line.split(":")[0] for line in chosen.missing_http({"quality": 1})] == [
        "--judge-endpoints",
        "--judge-served-model",
    ]
    with pytest.raises(ConfigurationError, match="--judge-endpoints: none for quality"):
        TeacherProcess(chosen)


def test_coherence_needs_an_http_teacher():
    with pytest.raises(ConfigurationError, match="judge-coherence-weight"):
        TeacherConfig(judge_coherence_weight=1.0).validate()
