"""A run waits at its start for servers that load their model, and ends in one line where none can come."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.errors import ConfigurationError, JudgeError
from megatron_sip.teacher.config import TeacherConfig
from megatron_sip.teacher.http import waiting
from megatron_sip.train.teacher_link import TeacherLink
from megatron_sip.train.teacher_start import await_servers, diagnosis
from tests.teacher.http.server import FaultServer

ALONE: Any = SimpleNamespace(rank=0, broadcast_from_rank_zero=lambda value: value)


def teacher(*urls: str, **changes: Any) -> TeacherConfig:
    values = {"teacher": "http", "judge_endpoints": urls, "judge_served_model": "m", **changes}
    return TeacherConfig(**values)


def start(config: TeacherConfig) -> list[str]:
    """What is said before the run goes on."""
    said: list[str] = []
    await_servers(config, {"quality": 1}, ALONE, said.append)
    return said


@pytest.fixture
def gone() -> str:
    with FaultServer() as server:
        return server.url


def test_servers_that_are_there_are_not_waited_for_and_a_dead_one_beside_them_is_said(gone: str) -> None:
    with FaultServer() as server:
        assert start(teacher(server.url)) == []
        (line,) = start(teacher(server.url, gone))
    assert line.startswith(f"judge endpoint {gone} does not answer") and line.endswith("the run starts all the same")


def test_without_any_server_the_run_ends_at_once_or_after_the_wait_with_endpoint_reason_and_remedy(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_ASK_EVERY_S", 0.1)
    for wait_s in (0.0, 0.5):
        with pytest.raises(JudgeError) as met:
            start(teacher(gone, judge_start_wait_s=wait_s))
        message = str(met.value)
        assert f"judge endpoint {gone} does not answer" in message and "refused" in message
        assert "start it, or give another of --judge-endpoints" in message
        assert f"give a longer --judge-start-wait-s than {wait_s:g}" in message and "\n" not in message


def test_another_model_is_an_error_however_long_one_would_wait() -> None:
    with FaultServer() as server, pytest.raises(JudgeError, match=r"serves m, not large: see --judge-served-model$"):
        start(teacher(server.url, judge_served_model="large", judge_start_wait_s=1e6))


def test_a_server_that_comes_late_is_waited_for_with_a_line_every_minute(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(waiting, "_SAY_EVERY_S", 0.2)
    with FaultServer() as server:
        server.models_status = 503  # as a gateway says while vLLM loads
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            server.models_status = 503 if len(said) < 3 else 200

        await_servers(teacher(server.url, judge_start_wait_s=60.0), {"quality": 1}, ALONE, say)
    assert len(said) == 3 and all("answers with HTTP 503" in line for line in said)
    assert all("(of 60 s, --judge-start-wait-s)" in line for line in said)


def test_the_wait_is_not_negative() -> None:
    with pytest.raises(ConfigurationError, match="judge-start-wait-s is -1"):
        teacher("http://h/v1", judge_start_wait_s=-1.0).validate()


@pytest.mark.parametrize(("limit_s", "words"), [(float("inf"), "(no limit)"), (0.3, "(of 0.3 s)")])
def test_lines_of_a_wait_say_its_limit_and_why(
    limit_s: float, words: str, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sip.train.teacher_link._SAY_EVERY_S", 0.1)
    monkeypatch.setattr("megatron_sip.train.teacher_link.HEARTBEAT_S", 0.05)
    said: list[str] = []
    answers = iter([False] * 8)

    def ready(ticket: int, wait_s: float) -> bool:
        time.sleep(wait_s)
        return next(answers, True)

    context: Any = SimpleNamespace(any_rank_each=lambda flags: flags)
    timers: Any = lambda name: threading.Lock()  # noqa: E731  (a context manager)
    link = TeacherLink(
        SimpleNamespace(wait=ready),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        context, timers, 8, 600.0, say=said.append, diagnose=lambda: diagnosis(teacher(gone), {"quality": 1}),
    )  # fmt: skip
    link.wait(1, timeout_s=limit_s)
    link.wait(1, timeout_s=limit_s, reason="all calls failed")
    assert words in said[0] and f"judge endpoint {gone} does not answer" in said[0]
    answers = iter([False] * 8)
    link.wait(1, timeout_s=limit_s, reason="all calls failed")
    assert said[-1].endswith(f"{words}: all calls failed")
