"""Covers the client against a real server that fails in every way we know of: what is retried, and exact counts."""

import asyncio
import datetime
import random
import socket
import time
from dataclasses import replace

import pytest

from megatron_sip.teacher.http.client import ChatClient, ClientSettings
from megatron_sip.teacher.http.config import HttpOptions
from megatron_sip.teacher.http.endpoints import EndpointPool, Outcome
from megatron_sip.teacher.http.failures import Failure, retry_after
from megatron_sip.teacher.http.greeting import complaints, greet
from megatron_sip.teacher.http.limits import backoff_s
from megatron_sip.teacher.http.reply import Reply
from tests.teacher.http.server import FaultServer

BODY = {"model": "m", "messages": [{"role": "user", "content": "Which?"}]}
KEY = "sk-very-secret"


def settings(**changes):
    values = dict(
        max_in_flight=64, connect_timeout_s=10.0, read_timeout_s=20.0, request_timeout_s=20.0, give_up_s=60.0,
        max_attempts=4, backoff_s=0.01, max_backoff_s=0.05, breaker_failures=1000, breaker_pause_s=0.05, rate_per_s=0.0,
        hedge_percentile=0.0,
    )  # fmt: skip
    return ClientSettings(**(values | changes))


def ask(urls, count=1, key="", **changes):
    """Answers to ``count`` concurrent requests, and the client's counts."""

    async def run():
        client = ChatClient(urls, settings(**changes), key)
        try:
            return await asyncio.gather(*(client.complete(lambda: BODY) for _ in range(count))), client
        finally:
            await client.close()

    answers, client = asyncio.run(run())
    return answers, client


def texts(answers):
    return [answer.choices[0].text if isinstance(answer, Reply) else answer.kind for answer in answers]


def dead_url():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/v1"


TRANSIENT = {
    "status 500": "server", "status 503": "server", "status 408": "server", "retry-after 0": "server",
    "garbage": "server", "truncated-json": "server", "empty-choices": "server", "abort": "server",
    "reset": "transport", "truncated-body": "transport", "hang": "transport",
}  # fmt: skip


IMPATIENT = {"read_timeout_s": 0.5}
"""A loaded machine needs more than this at times, so that only those tests have it that wait for it."""


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_transient_fault_is_tried_again_and_counted_once(fault):
    with FaultServer([fault, fault]) as server:
        answers, client = ask([server.url], **IMPATIENT if fault == "hang" else {})
    assert texts(answers) == ["Conclusion: Option 1"]
    assert server.counts == {fault: 2, "ok": 1}
    assert client.counts == {
        "requests": 1, "attempts": 3, "retries": 2, "answered": 1, f"attempt_{TRANSIENT[fault]}": 2,
    }  # fmt: skip


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_stays_is_a_failure_after_the_last_attempt(fault):
    with FaultServer(fault=lambda number: fault) as server:
        answers, client = ask([server.url], max_attempts=2, **IMPATIENT if fault == "hang" else {})
    assert texts(answers) == [TRANSIENT[fault]]
    assert server.counts == {fault: 2}
    assert client.counts["failed"] == 1 and client.counts["answered"] == 0


@pytest.mark.parametrize(
    "fault, kind",
    [("status 400", "rejected"), ("status 401", "rejected"), ("status 404", "rejected"), ("status 422", "rejected"),
     ("too-long", "too_long")],
)  # fmt: skip
def test_other_4xx_are_never_tried_again(fault, kind):
    with FaultServer(fault=lambda number: fault) as server:
        answers, client = ask([server.url])
    assert texts(answers) == [kind] and len(server.seen) == 1
    assert client.counts[f"attempt_{kind}"] == 1 and client.counts["retries"] == 0


def test_retry_after_is_honoured_by_every_request_to_that_server():
    with FaultServer(["retry-after 0.4"]) as server:
        answers, _ = ask([server.url], count=5, max_in_flight=1)
    first, *others = (seen.time_s for seen in server.seen)
    assert min(others) - first >= 0.39
    assert texts(answers) == ["Conclusion: Option 1"] * 5 and server.counts == {"retry-after 0.4": 1, "ok": 5}


def test_retry_after_is_read_as_seconds_or_as_a_date():
    now = datetime.datetime(2026, 11, 21, 7, 0, 0, tzinfo=datetime.UTC)
    assert retry_after("2.5", now) == 2.5
    assert retry_after("Sat, 21 Nov 2026 07:00:30 GMT", now) == 30.0
    assert retry_after("Sat, 21 Nov 2026 06:00:00 GMT", now) == 0.0
    assert retry_after("soon", now) is None and retry_after(None, now) is None


def test_a_storm_of_mixed_faults_is_counted_exactly():
    cycle = [
        "status 500",
        "",
        "reset",
        "",
        "garbage",
        "",
        "",
        "truncated-json",
        "",
        "empty-choices",
        "",
        "",
        "status 429",
    ]
    with FaultServer(fault=lambda number: cycle[number % len(cycle)]) as server:
        answers, client = ask([server.url], count=300, max_attempts=50)
    counts, seen = client.counts, server.counts
    assert texts(answers) == ["Conclusion: Option 1"] * 300
    assert seen["ok"] == counts["answered"] == 300
    assert counts["attempts"] == len(server.seen) == 300 + counts["retries"]
    assert counts["attempt_transport"] == seen["reset"] > 0
    assert counts["attempt_server"] == len(server.seen) - seen["reset"] - 300


def test_a_dead_endpoint_is_left_alone_while_others_answer():
    with FaultServer(delay_s=0.02) as one, FaultServer(delay_s=0.02) as two:
        answers, client = ask(
            [dead_url(), one.url, two.url], count=200, max_in_flight=8, breaker_failures=3, breaker_pause_s=60.0
        )
    assert texts(answers) == ["Conclusion: Option 1"] * 200
    # Up to 8 requests may be under way when it opens.
    assert 3 <= client.counts["attempt_transport"] <= 8
    assert len(one.seen) + len(two.seen) == 200 and min(len(one.seen), len(two.seen)) > 0


def test_when_all_endpoints_are_dead_requests_wait_and_go_on_when_one_is_back():
    with FaultServer() as server:
        server.stop()

        async def run():
            client = ChatClient([server.url], settings(breaker_failures=2, max_attempts=3, breaker_pause_s=0.05))
            asking = asyncio.gather(*(client.complete(lambda: BODY) for _ in range(20)))
            await asyncio.sleep(0.6)
            await asyncio.to_thread(server.start_again)
            try:
                return await asking, client
            finally:
                await client.close()

        answers, client = asyncio.run(run())
    assert texts(answers) == ["Conclusion: Option 1"] * 20
    # The first burst, then one probe per pause: 0.05, 0.1, 0.2, ... s.
    assert client.counts["attempt_transport"] <= 20 + 6
    assert client.endpoints[0].times_opened >= 2


def test_a_half_open_endpoint_gets_one_probe_at_a_time():
    def fault(number):
        return "status 500" if number < 4 else "slow 0.3" if number == 4 else ""

    with FaultServer(fault=fault) as server:
        answers, _ = ask([server.url], count=4, breaker_failures=4, max_attempts=30)
    assert texts(answers) == ["Conclusion: Option 1"] * 4
    probe, *others = (seen.time_s for seen in server.seen[4:])
    assert len(others) == 3 and min(others) - probe >= 0.29


def test_no_request_waits_longer_than_its_deadline():
    started = time.monotonic()
    answers, _ = ask([dead_url()], count=3, breaker_failures=1, give_up_s=0.5)
    assert texts(answers) == ["transport"] * 3
    assert time.monotonic() - started < 5.0


def test_a_request_that_found_no_endpoint_says_what_the_last_one_answered():
    """Of many that wait for a server that answers 500 only the probes ask it; the others would blame the network."""
    with FaultServer(fault=lambda number: "status 500") as server:
        answers, _ = ask([server.url], count=3, breaker_failures=1, give_up_s=1.0, breaker_pause_s=5.0)
    waited = [str(answer) for answer in answers if "no endpoint could be asked within 1 s" in str(answer)]
    assert waited and all("; the last failure is server: HTTP 500" in text for text in waited)


def test_requests_go_to_the_least_busy_endpoint():
    with FaultServer(delay_s=0.2) as slow, FaultServer(delay_s=0.01) as quick:
        ask([slow.url, quick.url], count=100, max_in_flight=10)
    assert len(slow.seen) + len(quick.seen) == 100
    assert slow.max_open <= 6 and len(quick.seen) > 2 * len(slow.seen)


def test_no_more_requests_are_under_way_than_allowed_and_connections_are_reused():
    with FaultServer(delay_s=0.005) as server:
        ask([server.url], count=100, max_in_flight=7)
    assert server.max_open == 7 and len(server.connections) <= 7


def test_the_rate_limit_spaces_requests():
    with FaultServer() as server:
        ask([server.url], count=10, rate_per_s=25.0)
    assert server.seen[-1].time_s - server.seen[0].time_s >= 9 / 25 - 0.02


def test_a_slow_request_is_hedged_by_a_second_one_elsewhere():
    with FaultServer(fault=lambda number: "slow 10" if number == 60 else "") as one, FaultServer() as two:

        async def run():
            client = ChatClient([one.url, two.url], settings(hedge_percentile=95.0))
            started = time.monotonic()
            answers = [await client.complete(lambda: BODY) for _ in range(150)]
            await client.close()
            return answers, client, time.monotonic() - started

        answers, client, elapsed = asyncio.run(run())
    assert texts(answers) == ["Conclusion: Option 1"] * 150
    assert client.counts["hedges"] >= 1 and elapsed < 9
    assert client.counts["requests"] == client.counts["answered"] == 150


def test_the_api_key_is_sent_and_masked_where_a_server_echoes_it():
    with FaultServer(["echo-key"]) as server:
        answers, _ = ask([server.url], key=KEY)
    assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert isinstance(answers[0], Failure) and "***" in str(answers[0]) and KEY not in repr(answers[0])


def test_an_attempt_has_a_time_limit_of_its_own_besides_that_of_silence():
    with FaultServer(["trickle 10"]) as server:
        answers, client = ask([server.url], request_timeout_s=0.5)
    assert texts(answers) == ["Conclusion: Option 1"] and client.counts["attempt_transport"] == 1


def test_a_server_that_accepts_no_connection_is_given_up_after_the_connect_time_out():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        # Two fill the queue of those not yet accepted; the kernel lets the next one wait.
        waiting = [socket.socket() for _ in range(2)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        url = f"http://127.0.0.1:{address[1]}/v1"
        started = time.monotonic()
        answers, client = ask([url], connect_timeout_s=0.3, max_attempts=2)
        took = time.monotonic() - started
        for one in waiting:
            one.close()
    assert texts(answers) == ["transport"] and client.counts["attempt_transport"] == 2 and 0.55 <= took < 10


def test_pauses_double_up_to_a_limit_and_are_spread_evenly_below_it():
    source = random.Random(3)
    for attempt, limit in ((1, 0.5), (2, 1.0), (3, 2.0), (7, 30.0), (60, 30.0)):
        pauses = sorted(backoff_s(attempt, 0.5, 30.0, source) for _ in range(2000))
        assert 0 <= pauses[0] < 0.01 * limit and 0.99 * limit < pauses[-1] <= limit
        assert abs(pauses[1000] - limit / 2) < 0.05 * limit


def test_a_request_that_waits_for_an_endpoint_ends_when_it_is_cancelled_while_another_one_ends():
    async def run():
        pool = EndpointPool(["http://one/v1"], 1, 60.0, random.Random(0))
        first = await pool.acquire(time.monotonic() + 60.0)
        second = await pool.acquire(time.monotonic() + 60.0)
        pool.release(first, Outcome.BAD)
        waiting = asyncio.create_task(pool.acquire(time.monotonic() + 60.0))
        await asyncio.sleep(0.01)
        pool.release(second, Outcome.BAD)
        await asyncio.sleep(0)
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=5.0)
        assert done and waiting.cancelled(), "it lost its cancellation and waits on"

    asyncio.run(run())


def test_bodies_are_made_when_their_turn_has_come():
    made = []

    async def run(server):
        client = ChatClient([server.url], settings(max_in_flight=3))
        asking = asyncio.gather(*(client.complete(lambda i=i: made.append(i) or BODY) for i in range(50)))
        await asyncio.sleep(0.2)
        early = len(made)
        await asking
        await client.close()
        return early

    with FaultServer(fault=lambda number: "slow 0.5" if number < 3 else "") as server:
        assert asyncio.run(run(server)) == 3
    assert sorted(made) == list(range(50))


def test_a_role_is_served_by_any_endpoint_that_may_answer_and_by_none_that_cannot():
    with FaultServer() as server:
        options = HttpOptions(judge_endpoints=(server.url,), judge_served_model="m", judge_start_wait_s=0.0)
        dead, nowhere = dead_url(), dead_url()
        roles = {"quality": 1, "rewriter": 1}
        assert greet(options, roles, "").unserved == ()
        assert greet(replace(options, judge_endpoints=(dead, server.url)), roles, "").unserved == ()
        # The rewriter alone is asked elsewhere, at two servers that are not there: they may come.
        own = {"rewriter.endpoints": [dead, nowhere]}
        found = greet(replace(options, judge_settings=own), roles, "")
        assert [line.split()[2] for line in found.unserved] == [dead, nowhere] and found.may_come
        # Another model does not become ours by waiting; next to a server that may come it is waited for.
        wrong = {"rewriter.model": "large"}
        assert not greet(replace(options, judge_settings=wrong), roles, "").may_come
        both = {**wrong, "rewriter.endpoints": [server.url, dead]}
        found = greet(replace(options, judge_settings=both), roles, "")
        assert found.may_come and "serves m, not large" in found.unserved[0]
        for status, served, may_come in ((401, 0, False), (403, 1, False), (429, 1, False), (503, 0, True)):
            server.models_status = status
            found = greet(options, {"quality": 1}, "")
            assert len(found.unserved) == 1 - served and len(found.complaints) == 1
            assert served or found.may_come == may_come


def test_lone_surrogates_do_not_stop_a_request():
    async def run():
        client = ChatClient([server.url], settings())
        answer = await client.complete(
            lambda: {**BODY, "messages": [{"role": "user", "content": "broken \ud800 text"}]}
        )
        await client.close()
        return answer

    with FaultServer() as server:
        assert isinstance(asyncio.run(run()), Reply)


def test_an_answer_without_end_is_a_failure_before_it_fills_the_memory():
    with FaultServer(fault=lambda number: "endless" if number < 2 else "") as server:
        answers, client = ask([server.url], read_timeout_s=30.0, request_timeout_s=60.0)
    assert texts(answers) == ["Conclusion: Option 1"] and client.counts["attempt_transport"] == 2
    assert server.most_sent < 200 * 2**20


def test_what_is_wrong_with_an_endpoint_is_said_before_training():
    with FaultServer() as server:
        url, dead = server.url, dead_url()
        options = HttpOptions(judge_endpoints=(url, dead), judge_served_model="large", judge_api_key_env="KEY_NAME")
        wrong, gone = complaints(options, {"quality": 1}, "")
        assert wrong == f"judge endpoint {url} serves m, not large: see --judge-served-model"
        assert gone.startswith(f"judge endpoint {dead} does not answer (") and "refused" in gone
        good = replace(options, judge_endpoints=(url,), judge_served_model="m")
        assert complaints(good, {"quality": 1, "rewriter": 1}, "") == complaints(good, {}, "") == []
        (tls,) = complaints(replace(good, judge_endpoints=(url.replace("http", "https"),)), {"quality": 1}, "")
        assert "a server of http?" in tls
        (path,) = complaints(replace(good, judge_endpoints=(url.removesuffix("/v1"),)), {"quality": 1}, "")
        assert "does the URL lack its /v1?" in path
        server.models_status = 401
        (key,) = complaints(good, {"quality": 1}, "")
        assert "HTTP 401" in key and "KEY_NAME" in key
        server.models_status = 0
        (page,) = complaints(good, {"quality": 1}, "")
        assert "something else than a list of models" in page
        server.models_status, started = -1, time.monotonic()
        (late,) = complaints(good, {"quality": 1}, "")
        assert "has not listed its models" in late and time.monotonic() - started < 8.0
